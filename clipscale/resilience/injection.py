"""Faults on purpose, for tests and rehearsals: `CLIPSCALE_FAULT=name@step:rank[,name@step:rank...]`.

    if injected("hang", step=7, rank=1):       # CLIPSCALE_FAULT=hang@7:1
        time.sleep(3600)

`*` stands for every step, or every rank.
"""

from __future__ import annotations

import os
import re

from clipscale.errors import require

VARIABLE = "CLIPSCALE_FAULT"
_ONE = re.compile(r"([a-z_]+)@(\d+|\*):(\d+|\*)")


def injected(name: str, *, step: int, rank: int) -> bool:
    """Whether the fault `name` is asked for at this step, on this rank. UserError: what is asked for cannot be read."""
    for word in filter(None, os.environ.get(VARIABLE, "").split(",")):
        match = _ONE.fullmatch(word)
        require(match is not None, f"{VARIABLE}={word!r} must be name@step:rank, such as nan_gradient@7:1")
        if match[1] == name and match[2] in ("*", str(step)) and match[3] in ("*", str(rank)):
            return True
    return False
