"""Leaving before the end: a signal or a time limit, the state saved, the marker, the exit status; and going on."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from forks import start
from shards import picture, write_pairs, write_shard
from tiny import tiny_config, write_config

from clipscale.checkpoint import find_checkpoint, load_checkpoint
from clipscale.cli import main
from clipscale.dist import World
from clipscale.errors import Interrupted, SharedError
from clipscale.eval.suite import CutShort, EvalSuite
from clipscale.guard.divergence import Guard
from clipscale.loss import contrastive_grads
from clipscale.loss.link import Alone, Link
from clipscale.resilience.leaving import Leaving, job_end
from clipscale.resilience.wishes import LEAVE, SAVE, Wishes
from clipscale.towers import build_towers
from clipscale.training.learner import Learner
from clipscale.training.trainer import Trainer, train

SIGNALS = ["SIGTERM", "SIGUSR1", "SIGHUP", "SIGINT"]


@pytest.fixture(scope="module")
def urls(tmp_path_factory) -> str:
    return write_pairs(tmp_path_factory.mktemp("data"), 4, 8, size=16)


@pytest.fixture(scope="module")
def twin(tmp_path_factory, urls) -> Path:
    folder = tmp_path_factory.mktemp("twin")
    train(tiny_config(folder, urls))
    return folder


def marker(folder: Path) -> dict | None:
    path = folder / "run" / "interrupted.json"
    return json.loads(path.read_text()) if path.exists() else None


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def assert_equal(one: Path, other: Path) -> None:
    """Weights, moments and what was learned at each step, to the bit."""
    first, second = (load_checkpoint(find_checkpoint(str(folder / "run"))) for folder in (one, other))
    assert first.step == second.step
    assert all(torch.equal(first.model[key], second.model[key]) for key in second.model)
    for name, state in second.optimizer["state"].items():
        assert all(torch.equal(first.optimizer["state"][name][key], state[key]) for key in state), name
    for key in ("step", "loss", "grad_norm", "lr"):
        assert [row[key] for row in rows(one)] == [row[key] for row in rows(other)]


def at_step(monkeypatch, number: int, act) -> None:
    """Do something in this step's update: when its loss is taken, and what ranks wish for has been told."""
    update = Learner.update

    def acting(self, *, step):
        if step == number:
            act()
        return update(self, step=step)

    monkeypatch.setattr(Learner, "update", acting)


@pytest.mark.parametrize("name", SIGNALS)
@pytest.mark.parametrize(
    ("environment", "status"), [({}, 75), ({"RANK": "0", "WORLD_SIZE": "1"}, 0)], ids=["alone", "torchrun"]
)
def test_a_signal_saves_by_the_end_of_the_next_step(
    tmp_path, urls, twin, monkeypatch, capsys, name, environment, status
):
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    config = write_config(tmp_path, urls)
    with monkeypatch.context() as patch:
        at_step(patch, 1, lambda: os.kill(os.getpid(), getattr(signal, name)))
        assert main(["train", config]) == (130 if name == "SIGINT" else status)
    found = marker(tmp_path)
    assert (found["why"], found["step"], found["job"], found["restart"]) == (name, 2, "", 0)
    err = capsys.readouterr().err
    assert f"clipscale: {name}: left after step 2, which is saved; the same command goes on from there" in err
    assert "Traceback" not in err
    assert [row["step"] for row in rows(tmp_path)] == [1, 2]
    assert main(["train", config]) == 0
    assert marker(tmp_path) is None
    assert_equal(tmp_path, twin)


def test_a_state_that_is_not_good_is_no_reason_to_stay(tmp_path, urls, monkeypatch, capsys):
    """It would be the end of a run that is at its end."""
    monkeypatch.setattr(Guard, "problem", lambda self: "the run shows collapse, for 1 step")
    at_step(monkeypatch, 2, lambda: os.kill(os.getpid(), signal.SIGUSR1))
    assert main(["train", write_config(tmp_path, urls)]) == 75
    assert "whose state is not saved (step 3: no checkpoint is written: the run shows" in capsys.readouterr().err
    assert marker(tmp_path)["step"] == 3


def test_a_signal_behind_the_last_step_changes_nothing(tmp_path, urls, twin, monkeypatch):
    with monkeypatch.context() as patch:
        at_step(patch, 4, lambda: os.kill(os.getpid(), signal.SIGUSR1))
        assert train(tiny_config(tmp_path, urls))[0].startswith("trained 4 steps")
    assert marker(tmp_path) is None
    assert_equal(tmp_path, twin)


def test_evaluations_that_are_due_are_left_to_the_next_start(tmp_path, urls, monkeypatch):
    words = [f"eval.validation.urls={urls}", "eval.validation.every_steps=2", "eval.validation.batch=8"]
    with monkeypatch.context() as patch:
        at_step(patch, 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
        patch.setattr("clipscale.eval.suite.EvalSuite.run", lambda *_: pytest.fail("time is short"))
        with pytest.raises(Interrupted, match="SIGTERM"):
            train(tiny_config(tmp_path, urls, *words))
    assert [row["step"] for row in rows(tmp_path)] == [1]
    train(tiny_config(tmp_path, urls, *words))
    assert [(row["step"], "validation/loss" in row) for row in rows(tmp_path)] == [
        (1, False),
        (2, True),
        (3, False),
        (4, True),
    ]


@pytest.mark.parametrize(("name", "step"), [("validation", 2), ("zeroshot", 4)])
def test_a_signal_in_an_evaluation_leaves_it_to_the_next_start(tmp_path, urls, monkeypatch, name, step):
    """It may take longer than there is time."""
    words = [f"eval.{name}.urls={urls}", f"eval.{name}.every_steps=2", f"eval.{name}.batch=8"]
    if name == "zeroshot":
        labelled = [(f"{i}", {"jpg": picture(i, 16, 16), "cls": b"%d" % (i % 2)}) for i in range(8)]
        words[0] = f"eval.zeroshot.urls={write_shard(tmp_path / 'labelled.tar', labelled)}"
        for key, text in (("classnames", "cat\ndog\n"), ("templates", "a {}\n")):
            (tmp_path / key).write_text(text)
            words.append(f"eval.zeroshot.{key}={tmp_path / key}")
    (tmp_path / "twin").mkdir()
    train(tiny_config(tmp_path / "twin", urls, *words))
    real, seen = EvalSuite.run, []

    def signalled(self, which):
        seen.append(which)
        if len(seen) == step // 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, which)

    with monkeypatch.context() as patch:
        patch.setattr(EvalSuite, "run", signalled)
        with pytest.raises(Interrupted, match="SIGTERM"):
            train(tiny_config(tmp_path, urls, *words))
    assert (marker(tmp_path)["why"], marker(tmp_path)["step"]) == ("SIGTERM", step)
    assert load_checkpoint(find_checkpoint(str(tmp_path / "run"))).step == step
    assert [row["step"] for row in rows(tmp_path)] == [*range(1, step)]
    assert not (tmp_path / "run" / "faults.jsonl").exists()
    train(tiny_config(tmp_path, urls, *words))
    assert_equal(tmp_path, tmp_path / "twin")
    scores = [key for key in rows(tmp_path)[3] if key.startswith(f"{name}/")]
    assert scores
    for key in scores:
        assert [row.get(key) for row in rows(tmp_path)] == [row.get(key) for row in rows(tmp_path / "twin")]


def test_the_end_of_a_jobs_time_is_a_reason_to_leave(tmp_path, urls, twin, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "3")
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 100))
    monkeypatch.setenv("CLIPSCALE_MARKER", str(tmp_path / "told"))
    with pytest.raises(Interrupted, match="the time limit"):
        train(tiny_config(tmp_path, urls))
    assert (tmp_path / "told").read_text() == "the time limit: left after step 1\n"
    found = marker(tmp_path)
    assert (found["why"], found["step"], found["job"], found["restart"]) == ("the time limit", 1, "77", 3)
    train(tiny_config(tmp_path, urls, "run.leave_before_seconds=0", "train.samples=16"))
    for end, samples in ((str(int(time.time()) + 1000), 24), ("soon", 32)):
        monkeypatch.setenv("SLURM_JOB_END_TIME", end)
        train(tiny_config(tmp_path, urls, f"train.samples={samples}"))
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4]


def test_steps_that_take_long_leave_earlier(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 1000))
    leaving = Leaving(before_seconds=1)
    deadline = time.monotonic() + 10
    while leaving.why(step_seconds=510) == "" and time.monotonic() < deadline:
        time.sleep(0.01)
    assert leaving.why(step_seconds=510) == "the time limit"
    assert leaving.why(step_seconds=400) == ""


def test_slurm_is_asked_where_it_does_not_say_by_itself(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert job_end() == float("inf"), "no scontrol here"
    tool = tmp_path / "scontrol"
    for said, wanted in (
        ("EndTime=Unknown", float("inf")),
        ("StartTime=2026-11-27T10:00:00 EndTime=2026-11-27T12:00:00", None),
    ):
        tool.write_text(f'#!/bin/sh\ntest "$*" = "--oneliner show job 77" && echo "JobId=77 {said} Deadline=N/A"\n')
        tool.chmod(0o755)
        wanted = time.mktime((2026, 11, 27, 12, 0, 0, 0, 0, -1)) if wanted is None else wanted
        assert job_end() == wanted


def test_another_signal_counts_after_a_while_and_ends_it_at_once(monkeypatch):
    leaving = Leaving(0)
    with leaving.training():
        for name in ("SIGTERM", "SIGINT", "SIGTERM"):  # Slurm and torchrun deliver twice
            os.kill(os.getpid(), getattr(signal, name))
        assert leaving.why(step_seconds=1) == "SIGTERM"
        monkeypatch.setattr("clipscale.resilience.leaving._AGAIN_SECONDS", 0.0)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("when", ["training()", "starting('nowhere')"])
def test_another_signal_while_it_leaves_is_that_signals_own_end(when):
    code = f"""
import os, signal
from clipscale.resilience import leaving
from clipscale.errors import Interrupted
leaving._AGAIN_SECONDS = 0.0
with leaving.Leaving(0).{when}:
    try:
        os.kill(os.getpid(), signal.SIGUSR1)
    except Interrupted:
        pass
    print("still here", flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
print("and here")
"""
    with start(code) as child:
        assert child.stdout.read() == "still here\n"
    assert child.status == -signal.SIGTERM


def test_what_is_ignored_stays_so_and_handlers_come_back():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        leaving, terminate = Leaving(0), signal.getsignal(signal.SIGTERM)
        with leaving.starting("nowhere"), leaving.training():
            os.kill(os.getpid(), signal.SIGHUP)
            assert signal.getsignal(signal.SIGTERM) is not terminate
        assert leaving.why(step_seconds=0) == ""
        assert signal.getsignal(signal.SIGTERM) is terminate
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("environment", [{}, {"RANK": "0", "WORLD_SIZE": "1"}], ids=["alone", "torchrun"])
def test_a_signal_before_the_first_step_ends_it_at_once_and_is_marked(tmp_path, urls, monkeypatch, capsys, environment):
    """Not for a batch script, and never with 0: a launcher sends it when another rank has failed, and a job that can
    not start would come back for ever."""
    for key, value in (environment | {"CLIPSCALE_MARKER": str(tmp_path / "told")}).items():
        monkeypatch.setenv(key, value)
    build, loaders = Trainer._build_data, []

    def interrupted(self, recorded):
        build(self, recorded)
        loaders.append(self.feed.loader)
        os.kill(os.getpid(), signal.SIGUSR1)

    monkeypatch.setattr(Trainer, "_build_data", interrupted)
    assert main(["train", write_config(tmp_path, urls)]) == 75
    assert (marker(tmp_path)["why"], marker(tmp_path)["step"]) == ("SIGUSR1", None)
    assert not (tmp_path / "told").exists()
    assert "clipscale: SIGUSR1: ended at once, for no step was under way" in capsys.readouterr().err
    monkeypatch.undo()
    assert main(["train", write_config(tmp_path, urls)]) == 0
    assert marker(tmp_path) is None


def test_ctrl_c_before_any_checkpoint_says_so(tmp_path, urls, monkeypatch, capsys):
    def interrupt(self, recorded):
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "_build_data", interrupt)
    assert main(["train", write_config(tmp_path, urls)]) == 130
    assert "clipscale: interrupted; nothing was saved: the same command begins again" in capsys.readouterr().err


# --- several ranks ----------------------------------------------------------------------------------------------------


class Other(Link):
    """Rank 0 of two, whose other rank gathers the same numbers and wishes for something else."""

    rank, size = 0, 2

    def __init__(self, wish: int) -> None:
        self.wish = wish

    def gather(self, values_K):
        other = values_K.clone()
        other[-1] = self.wish
        return torch.stack([values_K, other])

    def sum(self, values):
        return values

    def exchange(self, outgoing, to, incoming, source):
        raise AssertionError


def test_wishes_of_all_ranks_come_together():
    mine = [0]
    wishes = Wishes(Other(SAVE), lambda: mine[0])
    assert wishes.agreed() == 0
    values_K = torch.tensor([5, -7])
    assert torch.equal(wishes.gather(values_K), torch.stack([values_K, values_K]))
    assert wishes.agreed() == SAVE
    mine[0] = LEAVE
    assert wishes.agreed() == SAVE, "it came too late for this step"
    wishes.gather(values_K)
    assert wishes.agreed() == SAVE | LEAVE


class Pair(World):
    """A rank of two, the other of which is told to leave."""

    def gather(self, item, *, patient=False):
        return [item, isinstance(item, bool)]


def test_an_evaluation_that_the_other_rank_cuts_short_is_no_failure(tmp_path, urls, monkeypatch):
    config, fails = tiny_config(tmp_path, urls), SharedError("CutShort: ")
    suite = EvalSuite(config, build_towers(config.model), (4, 4), str.split, World(0, 1, 0, torch.device("cpu")))
    monkeypatch.setattr(suite, "run", Mock(side_effect=fails))
    assert suite.scores("validation", step=3) == {"validation/failed": 1.0}
    suite.world = Pair(0, 2, 0, torch.device("cpu"))
    with pytest.raises(CutShort):
        suite.scores("validation", step=3)


def test_the_loss_is_the_same_to_the_bit():
    image_ND, text_ND = (torch.nn.functional.normalize(torch.randn(13, 8), dim=1) for _ in range(2))
    wishes = Wishes(Alone(), lambda: LEAVE)
    plain, wished = (contrastive_grads(image_ND, text_ND, 14.0, group=group) for group in ("self", wishes))
    assert wishes.agreed() == LEAVE
    for one, other in zip(plain, wished, strict=True):
        assert torch.equal(torch.as_tensor(one), torch.as_tensor(other))


RANK = """
import os, signal
from pathlib import Path
config, rank, port, signalled = sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4] == sys.argv[2]
os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": rank, "WORLD_SIZE": "2", "LOCAL_RANK": rank}
os.environ["GLOO_SOCKET_IFNAME"] = "lo"
from clipscale.cli import main
from clipscale.training.learner import Learner
update = Learner.update

def acting(self, *, step):
    if step == 1 and signalled:
        os.kill(os.getpid(), signal.SIGUSR1)
    return update(self, step=step)

Learner.update = acting
sys.exit(main(["train", config]))
"""


def two_ranks(config: str, signalled: int) -> list[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    loaded = {"modules": ("clipscale.training.trainer",)}  # before a rank begins: importing it takes seconds
    ranks = [start(RANK, config, rank, port, signalled, **loaded) for rank in (0, 1)]
    with ranks[0] as first, ranks[1] as second:
        said = [child.stderr.read() for child in (first, second)]
    assert (first.status, second.status) == (0, 0), said
    return said


def test_a_signal_to_one_rank_takes_all_of_them_along(tmp_path, urls):
    (tmp_path / "twin").mkdir()
    two_ranks(write_config(tmp_path / "twin", urls), signalled=-1)
    config = write_config(tmp_path, urls)
    said = two_ranks(config, signalled=1)
    assert (marker(tmp_path)["why"], marker(tmp_path)["step"]) == ("SIGUSR1", 2)
    assert "SIGUSR1: left after step 2, which is saved" in said[0]
    two_ranks(config, signalled=-1)
    assert marker(tmp_path) is None
    assert_equal(tmp_path, tmp_path / "twin")
