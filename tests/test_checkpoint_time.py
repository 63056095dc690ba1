"""What a checkpoint costs the steps around it: a copy before it, and little while it is written. Prints the figures."""

import shutil
import statistics
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
import torch
from tiny import tiny_config
from torch import nn

from clipscale.checkpoint import RunState, Snapshot, save_checkpoint
from clipscale.checkpoint.staging import state_bytes
from clipscale.checkpoint.writer import CheckpointWriter

SAVES, STEPS, BYTES = 5, 10, 192_192_000  # of the weights and moments of sixteen layers of 1000 x 1000


@pytest.mark.slow
def test_a_save_costs_a_step_a_copy_and_the_steps_behind_it_little(tmp_path, capsys):
    """One thread trains. What it waits for a core, which others may use, is left out; the best of five saves counts."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        blocked, ratios, copy = measure(tmp_path)
    finally:
        torch.set_num_threads(threads)
    first, others = blocked[0] * 1e3, min(blocked[1:]) * 1e3
    with capsys.disabled():
        print(
            f"\n{BYTES / 1e6:.0f} MB: the first save blocks {first:.0f} ms, others {others:.0f}, a copy alone takes "
            f"{copy * 1e3:.0f} ms; steps take {min(ratios):.2f} to {max(ratios):.2f} x while it is written"
        )
    assert min(ratios) <= 1.3
    assert min(blocked) <= 3 * copy + 0.05
    assert blocked[0] <= 6 * copy + 0.1  # fresh memory would take 30 times as long as a copy


def seconds(work: Callable[[], object]) -> float:
    """Of a work, without those that its thread was ready and had no core."""
    begin, waited = time.perf_counter(), without_core()
    work()
    return time.perf_counter() - begin - (without_core() - waited)


def without_core() -> float:
    return int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9


def measure(folder: Path) -> tuple[list[float], list[float], float]:
    """Seconds that each save blocks; steps' time while it is written as a multiple of others'; seconds of a copy."""
    config = tiny_config(folder, "x.tar")
    model = nn.Sequential(*(nn.Linear(1000, 1000) for _ in range(16)))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    inputs = torch.rand(64, 1000)

    def step() -> None:
        model(inputs).square().sum().backward()
        optimizer.step()

    def save() -> None:
        state = (model.state_dict(), optimizer.state_dict(), RunState())
        writer.save(Snapshot(len(blocked), 8, *state, config))

    blocked, ratios = [], []
    with closing(CheckpointWriter(lambda snapshot: save_checkpoint(str(folder / "run"), snapshot, keep=1))) as writer:
        writer.prepare(state_bytes(model, optimizer), torch.device("cpu"))
        for _ in range(STEPS):
            step()
        for _ in range(SAVES):
            alone = [seconds(step) for _ in range(STEPS)]
            blocked.append(seconds(save))
            meanwhile = []
            while writer._thread.is_alive():
                meanwhile.append(seconds(step))
            alone += [seconds(step) for _ in range(STEPS)]
            ratios.append(statistics.mean(meanwhile) / statistics.mean(alone))
        ours = torch.zeros(BYTES, dtype=torch.uint8)
        copy = min(seconds(lambda: writer._staging._memory[:BYTES].copy_(ours)) for _ in range(3))
    shutil.rmtree(folder / "run")
    return blocked, ratios, copy
