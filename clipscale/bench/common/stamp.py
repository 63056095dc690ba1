"""On what a figure was measured: device, versions, commit, date."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from clipscale import __version__
from clipscale.device import device_name

_ROOT = Path(__file__).resolve().parents[3]


def stamp(device: torch.device) -> dict[str, Any]:
    """Everything as text, for JSON; "unknown" where this machine does not tell."""
    return {
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "device": device_name(device),
        "clipscale": __version__,
        "commit": commit(),
        "torch": torch.__version__,
        "triton": package_version("triton"),
        "cuda": torch.version.cuda or "none",
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or "none",
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def result_name(subject: str, device: torch.device) -> str:
    """Of a result's files: loss-nvidia-h200."""
    return f"{subject}-" + re.sub(r"\W+", "-", device_name(device).lower()).strip("-")


def package_version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "unknown"


def commit() -> str:
    """Of the checkout that clipscale runs from, with "-dirty" where tracked files differ from it.

    $CLIPSCALE_COMMIT instead where there is no checkout (a copy of one on another machine); else "unknown".
    """
    if _output("git", "rev-parse", "--show-toplevel") != str(_ROOT):
        return os.environ.get("CLIPSCALE_COMMIT", "unknown")
    changed = _output("git", "status", "--porcelain", "--untracked-files=no")
    return f"{_output('git', 'rev-parse', '--short=12', 'HEAD')}{'-dirty' if changed else ''}"


def _output(*command: str) -> str:
    """The command's first line; empty when it fails or is not there."""
    try:
        done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip().partition("\n")[0]
