"""docs/plot_run.py, which draws the README's pictures."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

SCRIPT = str(Path(__file__).resolve().parents[1] / "docs" / "plot_run.py")


def test_without_matplotlib_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit, match=r"matplotlib, which is not installed: pip install matplotlib"):
        runpy.run_path(SCRIPT)


def test_rows_with_and_without_what_only_some_steps_have(tmp_path, monkeypatch):
    rows = [
        {"step": 1, "samples": 8, "loss": 2.0},
        {"step": 2, "samples": 16, "loss": 1.5, "repeated_pairs": 0, "repeated_captions": 3, "zeroshot/top1": 0.5},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(sys, "argv", [SCRIPT, str(tmp_path), str(tmp_path / "run.png")])
    runpy.run_path(SCRIPT, run_name="__main__")
    assert (tmp_path / "run.png").stat().st_size > 5000


@pytest.mark.parametrize("fits", [True, False])
def test_where_the_time_went(tmp_path, monkeypatch, fits):
    row = {"step": 1, "samples": 8, "loss": 2.0, **({"seconds/loss": 0.5, "seconds/other": 0.5} if fits else {})}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    picture = tmp_path / "pictures" / "parts.png"
    monkeypatch.setattr(sys, "argv", [SCRIPT, "--parts", str(tmp_path), str(picture)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(SCRIPT, run_name="__main__")
    if fits:
        assert not ended.value.code
        assert picture.stat().st_size > 5000
    else:
        assert ended.value.code == f"no parts.png: no row of {tmp_path}/metrics.jsonl says where the time went"


def test_a_folder_without_metrics_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", [SCRIPT, str(tmp_path), str(tmp_path / "run.png")])
    with pytest.raises(SystemExit, match=r"metrics\.jsonl does not exist; name the folder of a run"):
        runpy.run_path(SCRIPT, run_name="__main__")
