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


SHAPES = ["first", pytest.param("other", marks=pytest.mark.slow)]
"""The shape that is taken untuned; and all others that may be tuned."""


@pytest.fixture(scope="module", params=LIMITS)
def capability(request):
    return request.param


@pytest.fixture(scope="module", params=SHAPES)
def compiled(request, capability):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compile_kernels.py")
    done = subprocess.run(
        [sys.executable, script, str(capability), request.param],
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_kernels_use_the_tensor_cores_and_nothing_spills(capability, compiled, request):
    first = request.node.callspec.params["compiled"] == "first"
    assert {case["precision"] for case in compiled} == {"fp16", "tf32", "fp32"} | ({"bf16"} if first else set())
    assert len(compiled) >= 8
    for case in compiled:
        assert case["spilled_bytes"] == 0 or OLD_ASSEMBLER, case
        assert case["registers"] <= 255
        assert case["shared_bytes"] <= LIMITS[capability], case
        assert case["tensor_cores"] == (case["precision"] != "fp32"), case
        assert not case["atomics"], case
        assert case["target"].startswith(f"sm_{capability}")


def test_no_atomics_check_would_see_one(tmp_path):
    """The same search, on a kernel that has one."""
    kernel = tmp_path / "kernel.py"
    kernel.write_text(
        "import triton, triton.language as tl\n\n\n@triton.jit\ndef add(total):\n    tl.atomic_add(total, 1.0)\n"
    )
    runner = (
        "import sys; sys.path[:0] = sys.argv[1:]; import compile_kernels, triton; from kernel import add; "
        "source = compile_kernels.ASTSource(add, {'total': '*fp32'}, {}, {}); "
        "target = compile_kernels.GPUTarget('cuda', 90, 32); "
        "print(compile_kernels.inspect(triton.compile(source, target=target), 90)['atomics'])"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", runner, str(Path(__file__).parent), str(tmp_path)],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert "atom" in done.stdout or "red." in done.stdout, done.stderr
