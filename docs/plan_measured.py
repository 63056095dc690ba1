"""`clipscale plan` against runs on this CPU: memory and seconds of a step, as planned and as measured.

    python docs/plan_measured.py             # prints the table of docs/plan.md; some minutes on two cores

Each run is a process of its own on the quickstart's pictures: two steps of the trainer, whose memory is that of the
whole process tree, anonymous and shared, each page once; its seconds are the last step's of CPU time, by torch's
threads, so that others who work on the machine are not in them.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time

from clipscale.config.load import load_config

VISION = "model.vision={{image_size: {}, patch_size: {}, width: {}, layers: {}, head_width: 64}}"
TEXT = "model.text={{context_length: 77, width: {}, heads: {}, layers: {}}}"
COMMON = [
    *("model.vision=null", "model.text=null", "eval.zeroshot.urls=null", "eval.validation.urls=null"),
    *("data.shapes.train_samples=4096", "data.allow_repeats=true", "gradcache.keep_bytes=0"),
]
SMALL = [VISION.format(64, 16, 384, 6), TEXT.format(256, 4, 4), "gradcache.image_chunk=128"]
RUNS = {
    "small, 256 pairs": [*SMALL, "train.global_batch=256", "gradcache.text_chunk=32"],
    "small, 256 pairs, chunks of 256 and 128": [
        *(*SMALL, "train.global_batch=256", "gradcache.image_chunk=256", "gradcache.text_chunk=128")
    ],
    "small, 1,024 pairs": [*SMALL, "train.global_batch=1024", "gradcache.text_chunk=32"],
    "small, 256 pairs, 500 MB of graphs kept": [
        *(*SMALL, "train.global_batch=256", "gradcache.text_chunk=32", "gradcache.keep_bytes=500000000")
    ],
    "small, 256 pairs, sgd": [*SMALL, "train.global_batch=256", "gradcache.text_chunk=32", "optim.kind=sgd"],
    "ViT-S-32, 64 pairs": [
        *("model.name=ViT-S-32", "train.global_batch=64", "gradcache.image_chunk=64", "gradcache.text_chunk=32")
    ],
    "ViT-B-32, 32 pairs": [
        *("model.name=ViT-B-32", "train.global_batch=32", "gradcache.image_chunk=32", "gradcache.text_chunk=16")
    ],
}
LOOK_SECONDS, STEPS = 0.05, 2


def measure(words: list[str]) -> None:
    """Two steps; prints the most bytes that the tree held, the last step's seconds, and tokens of a caption."""
    import torch

    from clipscale.bench.common.processes import held_bytes
    from clipscale.dist import World
    from clipscale.training.trainer import Trainer

    trainer = Trainer(load_config(words), World(0, 1, 0, torch.device("cpu")))
    most, ended = [held_bytes()], threading.Event()

    def look() -> None:
        while not ended.wait(LOOK_SECONDS):
            most[0] = max(most[0], held_bytes())

    watch = threading.Thread(target=look)
    watch.start()
    trainer.towers.model.train()
    for _ in range(STEPS):
        begin = time.process_time()
        row = trainer.step(next(trainer.feed.loader))
        seconds = (time.process_time() - begin) / torch.get_num_threads()
    ended.set()
    watch.join()
    trainer.close()
    print(most[0], seconds, row["tokens_per_caption"])


def main() -> None:
    from clipscale.forecast.hardware import cpu
    from clipscale.forecast.job import make_job
    from clipscale.forecast.measured import look_up
    from clipscale.forecast.memory import memory_of
    from clipscale.forecast.seconds import seconds_of

    print("| run | memory, planned | measured | error | s a step, planned | measured |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, more) in enumerate(RUNS.items()):
            words = ["quickstart", *COMMON, *more, f"run.dir={folder}/{number}", f"data.shapes.dir={folder}/shapes"]
            words += [f"data.sources.shapes.urls={folder}/shapes/train-*.tar"]
            command = [sys.executable, os.path.abspath(__file__), *words]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            held, seconds, tokens = map(float, done.stdout.splitlines()[-1].split())
            job = make_job(load_config(words), ranks=1, device=cpu(), tokens=tokens)
            planned, planned_seconds = memory_of(job).total, sum(seconds_of(job, look_up(job.device)).values())
            print(
                f"| {name} | {planned / 2**20:,.0f} MiB | {held / 2**20:,.0f} MiB | {planned / held - 1:+.1%} "
                f"| {planned_seconds:.1f} | {seconds:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    measure(sys.argv[1:]) if sys.argv[1:] else main()
