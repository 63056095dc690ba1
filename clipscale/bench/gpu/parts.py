"""The parts of a GPU's first hour, in order of worth: what runs, for how long, and where its figures are found.

part = PARTS[0]
limit_seconds(part, rest, left, "cuda")  # its share of what is left; None: too little is left
part.commands(Place("cuda", folder))     # one after the other, each in a process of its own
part.rows(Place("cuda", folder))         # what they have measured so far, also if they were stopped

A part is measured by this package (`measure.py`), or is another command whose result is read (`found.py`). No torch.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from clipscale.bench.gpu.found import loss_rows, own_rows, pytest_rows, step_rows

MINUTES = 25.0
_ROOT = Path(__file__).resolve().parents[3]  # of a checkout
_PYTHON = [sys.executable, "-m"]


class Place(NamedTuple):
    kind: str  # cuda or cpu: there all sizes are tiny
    folder: Path  # where a part's files go, which begin with its name


@dataclass(frozen=True)
class Part:
    name: str
    what: str
    share_seconds: int
    """Of the usual minutes; of others, as much more or less."""
    least_seconds: int
    """On a GPU: with less than that it is not begun."""
    commands: Callable[[Place], list[list[str]]]
    rows: Callable[[Path], list[dict[str, Any]]]
    """From the place's folder."""
    missing: Callable[[], str] = lambda: ""
    """Why it cannot run here; empty if it can."""
    fine: tuple[int, ...] = (0,)
    """The exit statuses of a part that has done its work."""


def limit_seconds(part: Part, rest: Sequence[Part], left: float, kind: str) -> float | None:
    """What `part` may take of the `left` seconds when the parts `rest` are to follow; None: it does not fit any more.

    Its share of what is left, so that the time which one part leaves over goes to those behind it.
    """
    least = part.least_seconds if kind == "cuda" else 1
    if left < least:
        return None
    share = left * part.share_seconds / sum(one.share_seconds for one in (part, *rest))
    return min(left, max(least, share))


def _measured(name: str, what: str, share_seconds: int, least_seconds: int) -> Part:
    """A part of `measure.py`."""

    def commands(place: Place) -> list[list[str]]:
        return [[*_PYTHON, "clipscale.bench.gpu.measure", name, place.kind, str(place.folder / f"{name}.jsonl")]]

    return Part(name, what, share_seconds, least_seconds, commands, lambda folder: own_rows(folder / f"{name}.jsonl"))


def _bench(subject: str, cases: dict[str, str], tiny: str) -> Callable[[Place], list[list[str]]]:
    """Another benchmark: once for each of the cases, by the name of its result, with these words; on a CPU the first
    alone, with the `tiny` words."""

    def commands(place: Place) -> list[list[str]]:
        words = cases if place.kind == "cuda" else {next(iter(cases)): tiny}
        where = ["--device", place.kind, "--output", str(place.folder)]
        bench = [*_PYTHON, "clipscale", "bench", subject]
        return [[*bench, *text.split(), *where, "--name", name] for name, text in words.items()]

    return commands


def _results(
    read: Callable[[Path], list[dict[str, Any]]], names: Iterable[str]
) -> Callable[[Path], list[dict[str, Any]]]:
    return lambda folder: [row for name in names for row in read(folder / f"{name}.json")]


def _pytest(place: Place) -> list[list[str]]:
    pytest = [*_PYTHON, "pytest", "-v", "-p", "no:cacheprovider", "--tb=short", "--rootdir", str(_ROOT)]
    tests = _ROOT / "tests"
    if place.kind == "cuda":
        return [[*pytest, "-m", "gpu", str(tests)], [*pytest, str(tests / "test_loss_kernels.py")]]
    return [[*pytest, str(tests / "test_words.py")]]


def _no_tests() -> str:
    if not (_ROOT / "tests" / "test_loss_kernels.py").is_file():
        return "the tests lie in the repository, not in the installed package"
    return "" if importlib.util.find_spec("pytest") else "pytest is not installed; pip install 'clipscale[test]'"


_TINY = "--batches 64 --widths 16 --precisions fp16 --seconds 0.01"
_LOSS = {"loss": "--peers --batches 16k,64k --precisions fp16,bf16 --seconds 1 --error-limit 64k --limit-seconds 40"}
_LARGE = {
    "large-loss": "--peers --batches 256k,1m --precisions fp16 --seconds 1 --error-limit 64k --limit-seconds 40",
}
_STEP = {
    "step-b32": "--peers --models ViT-B-32 --batches 32k --seconds 5",
    "step-b16": "--peers --models ViT-B-16 --batches 4k --seconds 5",
    "step-l14": "--peers --models ViT-L-14 --batches 2k --seconds 5",
}
_TINY_STEP = "--models small --batches 2 --seconds 0.01"

PARTS = (
    _measured("device", "what the device is; plain matrix products in fp16, bf16, tf32; copies on it", 40, 20),
    Part(
        *("tests", "the tests that need a GPU, and those of the loss's kernels", 170, 30),
        *(_pytest, pytest_rows, _no_tests, (0, 1)),
    ),
    _measured("pieces", "one macro-tile of the loss piece by piece, in every tile shape", 50, 30),
    Part(
        *("loss", "the loss beside its peers at 16k and 64k pairs", 110, 40),
        *(_bench("loss", _LOSS, f"--peers {_TINY}"), _results(loss_rows, _LOSS)),
    ),
    Part(
        *("large-loss", "the same at 256k and a million pairs", 150, 40),
        *(_bench("loss", _LARGE, _TINY), _results(loss_rows, _LARGE)),
    ),
    _measured("towers", "both towers by pass, with the host's time beside the device's", 80, 30),
    _measured("compiled", "the same after torch.compile", 200, 90),
    Part(
        *("step", "whole steps, beside open_clip's with accumulation", 260, 60),
        *(_bench("step", _STEP, _TINY_STEP), _results(step_rows, _STEP)),
    ),
    _measured("pinned", "page-locking the loader's memory, and copies to the device from it", 40, 20),
    _measured("million", "a ViT-B-32 step of 1,048,576 pairs, after one of 16k", 400, 240),
)
