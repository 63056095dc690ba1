"""Compiles the loss kernels at the shapes that may be tuned, ahead of time, without a GPU. A process of its own.

    python compile_kernels.py first 90 100    # one JSON line per compilation, for compute capabilities 9.0 and 10.0: of
                                              # each precision the shape that is taken untuned; and the control
    python compile_kernels.py other 90 100    # all other shapes

Triton's interpreter and its compiler cannot share a process: TRITON_INTERPRET must not be set.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from clipscale.loss import kernels
from clipscale.loss.tuning import candidates

TYPES = {"fp16": "fp16", "bf16": "bf16", "tf32": "fp32", "fp32": "fp32"}
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
TENSOR_CORES = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
POINTERS = {
    "row_slots",
    "column_slots",
    "diag",
    "row_level",
    "row_factor",
    "column_level",
    "column_factor",
    "d_scale_slots",
}
ALIGNED = {"D", "image_stride", "text_stride", "g_stride"}


def source_of(kernel, precision, shape, descriptors):
    """What the launcher compiles for operands of a width that 16 divides."""
    element = TYPES[precision]
    step = kernels._CHAIN.value if precision == "fp32" else shape.depth
    blocks = {
        "image": (shape.rows, step),
        "text": (shape.columns, step),
        "g": (shape.rows, shape.columns),
    }
    values = {
        "ROWS": shape.rows,
        "COLUMNS": shape.columns,
        "DEPTH": shape.depth,
        "GROUP": shape.group,
        "DESCRIPTORS": descriptors,
        "PRECISION": precision,
    }
    signature, aligned = {}, {}
    for position, name in enumerate(kernel.arg_names):
        if name in values:
            signature[name] = "constexpr"
        elif name in blocks and descriptors:
            signature[name] = f"tensordesc<{element}[{blocks[name][0]},{blocks[name][1]}]>"
        elif name in blocks or name in POINTERS:
            signature[name] = f"*{element if name in blocks else 'fp32'}"
        else:
            signature[name] = "fp32" if name in ("scale_log2", "origin") else "i32"
        if signature[name].startswith("*") or name in ALIGNED:
            aligned[(position,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, values, aligned)


def chains(ttgir):
    """Of each product: whether it goes on from a sum, rather than from 0."""
    zeros = re.findall(r"(%\S+) = arith\.constant dense<0\.0+e\+00>", ttgir)
    return [start not in zeros for start in re.findall(r"= tt\.dot \S+, \S+, (%[^\s,]+)", ttgir)]


def inspect(compiled, capability):
    """Registers, spilled bytes, and what the machine code is made of."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        report = subprocess.run(
            [CUOBJDUMP, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        )
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", report.stdout).groups()
    ptx = compiled.asm["ptx"]
    return {
        "registers": int(registers),
        "spilled_bytes": int(stack),
        "shared_bytes": compiled.metadata.shared,
        "chains": chains(compiled.asm["ttgir"]),
        "tensor_cores": TENSOR_CORES[capability] in ptx,
        "atomics": re.findall(r"^.*\b(?:atom|red)\.\S+", ptx, re.MULTILINE),
        "target": re.search(r"\.target (\w+)", ptx)[1],
    }


@triton.jit
def _adds_atomically(total):
    """The control: the search for atomics must find this one."""
    tl.atomic_add(total, 1.0)


def compile_control(capability):
    source = ASTSource(_adds_atomically, {"total": "*fp32"}, {}, {})
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    print(json.dumps({"case": "control", "capability": capability, **inspect(compiled, capability)}), flush=True)


def compile_all(capability, which):
    seen = set()
    for precision in TYPES:
        first, *others = candidates(precision, divmod(capability, 10))
        for shape in [first] if which == "first" else others if precision != "bf16" else []:  # bf16: as fp16
            for descriptors in {False, shape.descriptors}:
                for kernel in (kernels._logsumexp_kernel, kernels._gradient_kernel):
                    case = (precision, shape._replace(descriptors=descriptors), kernel.fn.__name__)
                    if case in seen:
                        continue
                    seen.add(case)
                    source = source_of(kernel, precision, shape, descriptors)
                    compiled = triton.compile(
                        source, target=GPUTarget("cuda", capability, 32), options=shape.options(descriptors)
                    )
                    found = inspect(compiled, capability)
                    told = {"case": f"sm_{capability} {case}", "capability": capability, "precision": precision}
                    told["depth"] = shape.depth
                    print(json.dumps(told | found), flush=True)


if __name__ == "__main__":
    for capability in map(int, sys.argv[2:]):
        compile_all(capability, sys.argv[1])
    if sys.argv[1] == "first":
        compile_control(capability)
