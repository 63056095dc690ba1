"""Where a zero-shot evaluation goes right and wrong: a table of its classes, and which are taken for which.

table = class_table(task, result)
table["classes"][1]         # {"name": "dog", "pictures": 50, "right_top1": 31, "right_top5": 46, "top1": 0.62, ...}
table["confusions"][0]      # {"class": "dog", "answered": "wolf", "pictures": 9}: all of them, the most first
worst_confusions(table)     # lines for a screen
"""

from __future__ import annotations

from itertools import islice
from typing import Any

from clipscale.eval.zeroshot import ZeroShotResult, ZeroShotTask
from clipscale.words import counted

SHOWN = 10


def class_table(task: ZeroShotTask, result: ZeroShotResult) -> dict[str, Any]:
    """Fit for JSON; the means of a class without pictures are None. With a subset, its labels are the classes."""
    titles, rows = task.subset.titles, zip(task.subset.right, result.seen, result.hits1, result.hits5, strict=True)
    return {
        "mean_per_class_recall": result.mean_per_class_recall,
        "classes": [
            {
                "name": title,
                "pictures": seen,
                "right_top1": hits1,
                "right_top5": hits5,
                "top1": hits1 / seen if seen else None,
                "top5": hits5 / seen if seen else None,
            }
            for title, (right, seen, hits1, hits5) in zip(titles, rows, strict=True)
            if right
        ],
        "confusions": [
            {"class": titles[label], "answered": task.classnames[answer], "pictures": times}
            for label, answer, times in result.misses
        ],
    }


def worst_confusions(table: dict[str, Any], shown: int = SHOWN) -> list[str]:
    """Lines that tell the first of them; none where every picture is right."""
    pictures = {row["name"]: row["pictures"] for row in table["classes"]}
    wrong = sum(row["pictures"] for row in table["confusions"])
    if not wrong:
        return []
    return [
        f"most often confused, of {counted(wrong, 'picture')} in another class than their own:",
        *(
            f"{row['pictures']:8,} of {pictures[row['class']]:,}  {row['class']} -> {row['answered']}"
            for row in islice(table["confusions"], shown)
        ),
    ]
