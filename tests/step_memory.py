"""A training step in a process of its own, run by test_step_memory.py with the words of a config.

Prints the most memory that the run's processes held together, in bytes.
"""

from __future__ import annotations

import sys
import threading

import torch

from clipscale.bench.common.processes import held_bytes
from clipscale.config.load import load_config
from clipscale.dist import World
from clipscale.training.trainer import Trainer

_LOOK_SECONDS = 0.1


def main() -> None:
    trainer = Trainer(load_config(sys.argv[1:]), World(0, 1, 0, torch.device("cpu")))
    most, ended = [held_bytes()], threading.Event()

    def look() -> None:
        while not ended.wait(_LOOK_SECONDS):
            most[0] = max(most[0], held_bytes())

    watch = threading.Thread(target=look)
    watch.start()
    trainer.towers.model.train()
    trainer.step(next(trainer.feed.loader))
    ended.set()
    watch.join()
    trainer.close()
    print(most[0])


if __name__ == "__main__":
    main()
