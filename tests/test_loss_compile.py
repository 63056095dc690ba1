"""The kernels, at the shapes that may be tuned, compiled ahead of time for the GPUs that are not here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton

LIMITS = {80: 166_912, 90: 232_448, 100: 232_448}
"""Shared memory of one program, in bytes (CUDA C++ Programming Guide, technical specifications)."""

OLD_ASSEMBLER = tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 6)
"""Triton 3.4's spills up to 200 bytes of some shapes, which then lose when they are timed."""


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=["first", "other"])
def compiled(request):
    """The shape that is taken untuned, or all others that may be tuned; and what became of them, for each GPU."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, Path(__file__).with_name("compile_kernels.py"), request.param, *map(str, LIMITS)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    return request.param, [json.loads(line) for line in done.stdout.splitlines()]


def test_kernels_use_the_tensor_cores_and_nothing_spills(compiled):
    which, found = compiled
    cases = [case for case in found if case["case"] != "control"]
    for capability in LIMITS:
        mine = [case for case in cases if case["capability"] == capability]
        precisions = {case["precision"] for case in mine}
        assert precisions == {"fp16", "tf32", "fp32"} | ({"bf16"} if which == "first" else set())
        assert len(mine) >= 8
    for case in cases:
        capability = case["capability"]
        assert case["spilled_bytes"] == 0 or OLD_ASSEMBLER, case
        assert case["registers"] <= 255
        assert case["shared_bytes"] <= LIMITS[capability], case
        assert case["tensor_cores"] == (case["precision"] != "fp32"), case
        assert not case["atomics"], case
        if case["precision"] == "fp32":  # 16 products are a chain, and each chain is added to what went before
            assert case["chains"] == [False] * (case["depth"] // 16), case
        assert case["target"].startswith(f"sm_{capability}")
    controls = [case for case in found if case["case"] == "control"]
    assert len(controls) == (which == "first")
    assert all(control["atomics"] for control in controls), "the search for atomics would see one"
