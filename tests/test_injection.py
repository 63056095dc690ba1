"""Faults on purpose, and the rows of those that were met."""

import json

import pytest

from clipscale.errors import UserError
from clipscale.resilience.injection import injected
from clipscale.telemetry.faults import recording, report_fault
from clipscale.telemetry.runlog import RunLog


def test_a_fault_is_met_at_its_step_and_rank_only(monkeypatch):
    monkeypatch.setenv("CLIPSCALE_FAULT", "hang@7:1,slow@*:0,full_disk@3:*")
    met = {
        (name, step, rank)
        for name in ("hang", "slow", "full_disk")
        for step in (3, 7)
        for rank in (0, 1)
        if injected(name, step=step, rank=rank)
    }
    assert met == {("hang", 7, 1), ("slow", 3, 0), ("slow", 7, 0), ("full_disk", 3, 0), ("full_disk", 3, 1)}
    monkeypatch.delenv("CLIPSCALE_FAULT")
    assert not injected("hang", step=7, rank=1)


@pytest.mark.parametrize("word", ["hang", "hang@7", "hang@x:1", "Hang@7:1", "hang@7:1;slow@1:0"])
def test_a_fault_that_cannot_be_read_is_refused(monkeypatch, word):
    monkeypatch.setenv("CLIPSCALE_FAULT", word)
    with pytest.raises(UserError, match="must be name@step:rank"):
        injected("hang", step=7, rank=1)


def test_a_fault_is_told_and_recorded_in_the_innermost_place(told):
    outer, inner = [], []
    with recording(outer.append):
        with recording(inner.append):
            report_fault(
                "evaluation", "zeroshot failed: no.tar", action="its row is left out", step=5, lost_seconds=2.5
            )
        report_fault("disk", "full", action="going on", lost_steps=3)
    report_fault("drift", "ranks differ", action="stopping")
    assert [row["kind"] for row in inner] == ["evaluation"]
    assert outer == [
        {"kind": "disk", "step": None, "what": "full", "action": "going on", "lost_steps": 3, "lost_seconds": 0.0}
    ]
    assert told == [
        "warning: zeroshot failed: no.tar; its row is left out",
        "warning: full; going on",
        "warning: ranks differ; stopping",
    ]


def test_a_run_keeps_its_faults_whichever_rank_met_them(tmp_path):
    """Those that every rank meets alike once."""
    for rank in (0, 3):
        with RunLog(str(tmp_path), rank=rank):
            report_fault("disk", "full", action="going on", step=8, every_rank=True)
            report_fault("evaluation", "failed", action="going on", step=9)
    rows = [json.loads(line) for line in (tmp_path / "faults.jsonl").read_text().splitlines()]
    assert [(row["rank"], row["kind"], row["step"]) for row in rows] == [
        (0, "disk", 8),
        (0, "evaluation", 9),
        (3, "disk", 8),
    ]
