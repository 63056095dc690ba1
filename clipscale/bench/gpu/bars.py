"""What the parts should reach, what they did, and what to try where they did not.

bars(document["parts"])    # [{"what": ..., "bound": "at least 0.65", "reached": "0.805", "met": True, "next": ""}, ...]

Bounds are for a GPU of an H100's or H200's class. A bar without figures says why: it is never met by silence.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from clipscale.bench.common.tables import short
from clipscale.bench.common.words import size_name

Rows = dict[str, list[dict[str, Any]]]  # of each part that has any
Figures = dict[str, float]  # what a bar holds, by where it was taken; empty: not measured

_K16, _K32, _K64, _K256, _M1 = 2**14, 2**15, 2**16, 2**18, 2**20
_EXTRA_MB, _EXTRA_BYTES_A_PAIR = 600, 32


@dataclass(frozen=True)
class Bar:
    what: str
    parts: tuple[str, ...]
    figures: Callable[[Rows], Figures]
    bound: float
    remedy: str
    at_most: bool = False
    whole: bool = False
    """Whether it can be met only by parts that came to their end."""

    def judge(self, rows: Rows, ends: dict[str, str]) -> dict[str, Any]:
        """`ends`: how each part ended, in words."""
        found = self.figures(rows)
        bound = "that it runs" if math.isinf(self.bound) else f"at {'most' if self.at_most else 'least'} {self.bound:g}"
        judged = {"what": self.what, "bound": bound}
        if not found:
            told = ((part, ends.get(part, "not asked for")) for part in self.parts)
            why = "; ".join(f"{part}: {'no such row' if end == 'measured' else end}" for part, end in told)
            return judged | {"reached": f"not measured ({why})", "met": None, "next": ""}
        met = all(value <= self.bound if self.at_most else value >= self.bound for value in found.values())
        reached = ", ".join(f"{short(value)} {where}".strip() for where, value in found.items())
        if self.whole and met and (cut := [part for part in self.parts if ends[part] != "measured"]):
            return judged | {"reached": f"{reached}, so far ({cut[0]}: {ends[cut[0]]})", "met": None, "next": ""}
        return judged | {"reached": reached, "met": met, "next": "" if met else self.remedy}


def bars(parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The bars that any of these parts is for, with what the parts found."""
    rows = {part["name"]: part["rows"] for part in parts if part["rows"]}
    ends = {part["name"]: end_of(part) for part in parts}
    return [bar.judge(rows, ends) for bar in BARS if not ends.keys().isdisjoint(bar.parts)]


def end_of(part: dict[str, Any]) -> str:
    """How a part ended, in words."""
    return part["status"] + (f": {part['note']}" if part["note"] else "")


def _product(rows: Rows) -> Figures:
    rates = [row["value"] for row in rows.get("device", []) if row["what"].startswith("product fp16")]
    return {"": rates[0]} if rates else {}


def _failed_tests(rows: Rows) -> Figures:
    counts = {row["what"]: row["value"] for row in rows.get("tests", []) if "note" not in row}
    if not counts.get("passed"):
        return {}
    return {f"of {sum(counts.values()) - counts['skipped']}": counts["failed"] + counts["error"]}


def _loss(rows: Rows, precision: str) -> Iterator[tuple[int, dict[str, dict[str, Any]]]]:
    """Each batch, and the contestants that were measured there, by name."""
    found: dict[int, dict[str, dict[str, Any]]] = {}
    for row in (*rows.get("loss", []), *rows.get("large-loss", [])):
        if row["precision"] == precision and "both ms" in row:
            found.setdefault(row["batch"], {})[row["contestant"]] = row
    yield from sorted(found.items())


def _own(column: str, batch: int) -> Callable[[Rows], Figures]:
    def figures(rows: Rows) -> Figures:
        cases = dict(_loss(rows, "fp16"))
        return {"": cases[batch]["clipscale"][column]} if "clipscale" in cases.get(batch, {}) else {}

    return figures


def _faster_than(peers: tuple[str, ...], precision: str, batches: Callable[[int], bool]) -> Callable[[Rows], Figures]:
    """How many times as fast as the fastest of the peers."""

    def figures(rows: Rows) -> Figures:
        found = {}
        for batch, by_name in _loss(rows, precision):
            times = [by_name[peer]["both ms"] for peer in peers if peer in by_name]
            if batches(batch) and times and "clipscale" in by_name:
                found[f"at {size_name(batch)}"] = min(times) / by_name["clipscale"]["both ms"]
        return found

    return figures


def _rate_beside_sigmoid(rows: Rows) -> Figures:
    by_name = dict(_loss(rows, "fp16")).get(_K64, {})
    if not {"clipscale", "siglip-kernel"} <= by_name.keys():
        return {}
    return {"": by_name["clipscale"]["TFLOP/s"] / by_name["siglip-kernel"]["TFLOP/s"]}


def _extra_memory(rows: Rows) -> Figures:
    return {
        f"at {size_name(batch)}": by_name["clipscale"]["extra MB"] - _EXTRA_BYTES_A_PAIR * batch / 1e6
        for batch, by_name in _loss(rows, "fp16")
        if batch >= _K16 and "clipscale" in by_name
    }


def _million_seconds(rows: Rows) -> Figures:
    return {where: milliseconds / 1e3 for where, milliseconds in _own("both ms", _M1)(rows).items()}


def _towers(model: str) -> Callable[[Rows], Figures]:
    """Both towers' share of the matmul rate together, each at its best chunk: FLOPs of a pair by the time they take."""

    def figures(rows: Rows) -> Figures:
        found = {}
        for part, how in (("towers", "eager"), ("compiled", "compiled")):
            best: dict[str, dict[str, Any]] = {}
            for row in rows.get(part, []):
                if row["model"] == model and row.get("samples/s", 0) > best.get(row["tower"], {}).get("samples/s", 0):
                    best[row["tower"]] = row
            if len(best) == 2:
                work = [row["GFLOP a sample"] for row in best.values()]
                time = [row["GFLOP a sample"] / row["of matmul"] for row in best.values()]
                found[how] = sum(work) / sum(time)
        best_how = max(found, key=found.get, default=None)
        return {} if best_how is None else {best_how: found[best_how]}

    return figures


def _accumulation(rows: Rows) -> Figures:
    """The better of clipscale's ways."""
    ratios = [
        row["of open_clip"]
        for row in rows.get("step", [])
        if (row["model"], row["batch"]) == ("ViT-B-32", _K32)
        and row["contestant"].startswith("clipscale")
        and row.get("of open_clip") is not None
    ]
    return {"": max(ratios)} if ratios else {}


def _million_step(rows: Rows) -> Figures:
    seconds = [row["step s"] for row in rows.get("million", []) if row["pairs"] == _M1]
    return {"": seconds[0]} if seconds else {}


_HOST = (
    "hold the host's time in the towers' rows against the device's: where they are about equal the host is the limit: "
    "larger chunks, or torch.compile; else profile one chunk, and look at what is no matrix product (copies, "
    "additions, the patch embedding's convolution)"
)
BARS = (
    Bar(
        *("plain fp16 product, TFLOP/s", ("device",), _product, 700),
        "look at the card's power limit, clocks and temperature among the device's rows, and for another process on "
        "it; try torch.backends.cuda.preferred_blas_library('cublaslt')",
    ),
    Bar(
        *("tests that fail", ("tests",), _failed_tests, 0),
        "run the first that fails by itself; an illegal access: compute-sanitizer on it, at its smallest size",
        at_most=True,
        whole=True,
    ),
    Bar(
        *("loss at 64k pairs, of the plain product", ("loss",), _own("of matmul", _K64), 0.65),
        "compare the pieces' sum with the whole: what the pieces do not have is the host's time; the slowest piece "
        "says where to look: addmm (its fp16 row beside it), the tile kernel (another shape), or the merge",
    ),
    Bar(
        *("the same, as far as it was hoped", ("loss",), _own("of matmul", _K64), 0.80),
        "the tile kernels have the room: one exponential a logit in place of two, or the next tile's product under "
        "this one's exponentials",
    ),
    Bar(
        *("times as fast as open_clip's dense loss, bf16, from 16k on", ("loss",)),
        _faster_than(("open_clip", "open_clip, autocast"), "bf16", lambda batch: batch >= _K16),
        *(1, "at 16k pairs the time is the host's: fewer, larger launches"),
    ),
    Bar(
        *("times as fast as inf-cl at 64k and 256k", ("loss", "large-loss")),
        _faster_than(("inf-cl",), "fp16", lambda batch: batch in (_K64, _K256)),
        *(10, "see the loss at 64k pairs; look whether inf-cl changed its precision"),
    ),
    Bar(
        *("times as fast as memeff at 64k and 256k", ("loss", "large-loss")),
        _faster_than(("memeff",), "fp16", lambda batch: batch in (_K64, _K256)),
        *(3, "see the loss at 64k pairs"),
    ),
    Bar(
        *("rate beside siglip-kernel's at 64k, each on its own arithmetic", ("loss",), _rate_beside_sigmoid, 1),
        "its one pass has no statistics: shorten the logsumexp kernel, whose column reductions cost most",
    ),
    Bar(
        f"extra MB of the loss, less {_EXTRA_BYTES_A_PAIR} bytes a pair",
        *(("loss", "large-loss"), _extra_memory, _EXTRA_MB),
        "take a memory snapshot of one call: something beside the workspace of one macro-tile lives through it",
        at_most=True,
    ),
    Bar(
        *("seconds of the loss at a million pairs", ("large-loss",), _million_seconds, 13),
        "hold its share of the plain product beside that at 64k: the same means a slower card (power, heat), less "
        "means that macro-tiles wait for the host",
        at_most=True,
    ),
    Bar("ViT-B-16's towers, of the plain product", ("towers", "compiled"), _towers("ViT-B-16"), 0.55, _HOST),
    Bar("ViT-L-14's towers, of the plain product", ("towers", "compiled"), _towers("ViT-L-14"), 0.55, _HOST),
    Bar(
        *("times as fast as open_clip's accumulation, ViT-B-32, 32k pairs", ("step",), _accumulation, 1.5),
        "larger chunks (gradcache.image_chunk, gradcache.text_chunk), and more kept graphs (gradcache.keep_bytes)",
    ),
    Bar(
        *("seconds of a step of 1,048,576 pairs, ViT-B-32", ("million",), _million_step, math.inf, ""),
        at_most=True,
    ),
)
