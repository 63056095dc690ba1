"""A result on the disk: <name>.json with every number, <name>.md for a reader, pictures beside them.

write(document, Path("bench-results"), markdown(document, []))          # after every part, so that none is lost
finish(document, Path("bench-results"), draw=draw, markdown=markdown)   # at the end, with the pictures
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

LAST_LINE = "What the columns mean: `docs/benchmarks/README.md` of clipscale."


def heading(document: dict[str, Any], what: str) -> list[str]:
    """Title, what made the results, and whether they are whole."""
    stamp = document["stamp"]
    lines = [
        f"# {what} on {stamp['device']}",
        "",
        f"Measured {stamp['date']} by clipscale {stamp['clipscale']} at commit {stamp['commit']}, with torch "
        f"{stamp['torch']}, triton {stamp['triton']}, CUDA {stamp['cuda']}, driver {stamp['driver']}, Python "
        f"{stamp['python']}:",
        "",
        f"```\n{document['command']}\n```",
        "",
    ]
    return lines if document["finished"] else [*lines, "**Not finished**: the command ended before its last case.", ""]


def images(pictures: list[str]) -> list[str]:
    return [f"![{Path(picture).stem}]({picture})" for picture in pictures]


def write(document: dict[str, Any], folder: Path, text: str) -> list[Path]:
    """<name>.json and <name>.md in `folder`, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    numbers, page = folder / f"{document['name']}.json", folder / f"{document['name']}.md"
    numbers.write_text(json.dumps(_finite(document), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    page.write_text(text, encoding="utf-8")
    return [numbers, page]


def finish(
    document: dict[str, Any],
    folder: Path,
    *,
    draw: Callable[[dict[str, Any], Path], tuple[list[Path], str]],
    markdown: Callable[[dict[str, Any], list[str]], str],
) -> None:
    """Write a result with its pictures, and say where everything lies. `draw`: the pictures, or why there is none."""
    pictures, problem = draw(document, folder)
    files = [*write(document, folder, markdown(document, [picture.name for picture in pictures])), *pictures]
    if problem:
        print(problem)
    print("written: " + " ".join(str(file) for file in files))


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become words."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
