"""A part that this package measures itself, in a process of its own.

    python -m clipscale.bench.gpu.measure towers cuda FOLDER/towers.jsonl

Each row is in the file as soon as it is known, so that a process which is stopped loses one at most. The parts are
generators of rows, given the world of one process; torch, open_clip and the loss's kernels are imported by theirs only.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import Any

from clipscale.dist import World, start_world
from clipscale.errors import UserError
from clipscale.escape import one_line
from clipscale.files import append_rows


def measure(name: str, world: World) -> Iterator[dict[str, Any]]:
    """The rows of a part; of "stamp" one, with what the result's heading says."""
    if name == "stamp":
        from clipscale.bench.common.stamp import result_name, stamp

        yield {"stamp": stamp(world.device), "kind": world.device.type, "name": result_name("gpu", world.device)}
    elif name == "device":
        from clipscale.bench.gpu.device import device_rows

        yield from device_rows(world)
    elif name == "pieces":
        from clipscale.bench.gpu.pieces import piece_rows

        yield from piece_rows(world)
    elif name == "million":
        from clipscale.bench.gpu.million import million_rows

        yield from million_rows(world)
    elif name == "pinned":
        from clipscale.bench.gpu.pinned import pinned_rows

        yield from pinned_rows(world)
    else:
        from clipscale.bench.gpu.towers import tower_rows

        yield from tower_rows(world, compiled=name == "compiled")


def main(name: str, device: str, file: str) -> int:
    if device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # the loss's kernels on CPU tensors; read when they are imported
    try:
        with start_world(device) as world:
            for row in measure(name, world):
                print(row, flush=True)
                append_rows(file, [row])
    except UserError as error:
        print(one_line(error))
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
