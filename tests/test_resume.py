"""A run that is SIGKILLed and started again is the run that was never interrupted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


# Before the first checkpoint, at the end of an epoch, in the last step; and in saves that are in flight.
STEPS = 10
KILLS = ("1,5,10", "staged@4,written@8")
MORE_STEPS = 20
CHAINS = (
    "1,5,9,13,17,published@20",
    "2,6,10,14,18,written@20",
    "3,7,11,15,19",
    "4,8,12,16,20",
    "staged@2,published@10",
    "written@2,written@10",
)
"""A run is killed several times, at every step there is and in saves: far enough apart for the next attempt to begin
with a checkpoint of the one before it, so that the end shows what any resume has broken."""


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> dict:
    """The experiments of resume_harness.py."""
    return experiments(tmp_path_factory.mktemp("resume"), STEPS, *KILLS)


@pytest.fixture(scope="module")
def further_report(tmp_path_factory) -> dict:
    return experiments(tmp_path_factory.mktemp("resume"), MORE_STEPS, *CHAINS, "--kills-only")


def experiments(folder: Path, *words: int | str) -> dict:
    done = subprocess.run(
        [sys.executable, str(TESTS / "resume_harness.py"), str(folder), *map(str, words)],
        capture_output=True,
        text=True,
        timeout=500,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_the_run_holds_what_makes_it_hard(report):
    """A masked slot, an epoch boundary, every step in the log once."""
    assert report["masked"] >= 2  # the broken sample comes by in every epoch
    assert report["steps"] == list(range(1, STEPS + 1))
    assert report["keys"] == STEPS
    assert report["distinct_keys"] == 20  # 80 slots of 20 samples: three epoch boundaries


@pytest.mark.parametrize("kills", KILLS)
def test_killed_and_resumed_is_bit_for_bit_the_same(report, kills):
    assert unlike(report, kills) == []


@pytest.mark.slow
@pytest.mark.parametrize("kills", CHAINS)
def test_killed_and_resumed_again_and_again_is_bit_for_bit_the_same(further_report, kills):
    assert unlike(further_report, kills) == []


def test_no_step_is_left_out():
    kills = [word for chain in CHAINS for word in chain.split(",")]
    assert sorted(int(word) for word in kills if word.isdigit()) == list(range(1, MORE_STEPS + 1))


def unlike(report: dict, kills: int | str) -> list[str]:
    """What differs from the run that was never interrupted."""
    return [what for what, same in report["same_world"][str(kills)].items() if not same]


def test_resumed_from_the_mirror_alone_is_bit_for_bit_the_same(report):
    assert report["fetched"]
    assert [what for what, same in report["mirror"].items() if not same] == []
    assert report["mirror"].keys() == {
        "tensors",
        "optimizer",
        "averages",
        "masked",
        "checkpoints",
        "slots",
        "consistent",
    }


@pytest.mark.parametrize("change", ["1 to 2", "2 to 1"])
def test_resumed_on_another_number_of_ranks(report, change):
    found = report["other_world"][change]
    assert found["same_samples"]
    assert found["masked"]
    assert found["loss_error"] <= 1e-5


@pytest.mark.parametrize("policy", ["report", "stop"])
def test_a_disk_that_is_full_for_one_rank_costs_no_step_where_the_run_goes_on(report, policy):
    """With a real limit: all ranks agree, the stub is gone, the error says what and where."""
    found = report["full_disk"][policy]
    assert found["what"].endswith(" needed")
    for part in ("step-000000004 cannot be written (", " MiB free): File too large (", "model.safetensors); "):
        assert part in found["what"]
    assert found["stubs"] == 0
    assert found["steps"] == list(range(1, STEPS + 1))
    assert found["same_samples"]
    assert found["loss_error"] <= 1e-5
    assert found["ranks_told"] == ([0, 1] if policy == "stop" else [])
    assert found["disk_faults"][0] == 4
    assert policy == "stop" or found["disk_faults"] == [4, 6]


def test_the_comparison_can_fail(report):
    assert report["control"] == {"same_samples": False, "same_tensors": False}
