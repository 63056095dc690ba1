"""slurm/*.sbatch in a real Slurm: what is put back into the queue goes on where it was, and nothing else is put back.

Each job trains a tiny model on two nodes, a rank each; a step takes a little longer than it must, so that what is done
to the job falls into its middle. All happens at once, in threads: what takes a node away, or both, has its own two.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from copy import copy
from pathlib import Path

import pytest
import torch
from shards import write_pairs
from slurm.cluster import Cluster, cluster, until
from tiny import write_config

from clipscale.checkpoint import find_checkpoint, load_checkpoint
from clipscale.resilience.beats import read_beats

ROOT = Path(__file__).parents[2]
TRAIN, EVAL = ROOT / "slurm" / "train.sbatch", ROOT / "slurm" / "eval.sbatch"
STEPS = 24

pytestmark = [pytest.mark.slurm, pytest.mark.needs("slurm")]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    with cluster(tmp_path_factory.mktemp("cluster")) as found:
        yield found


@pytest.fixture(scope="module")
def urls(tmp_path_factory) -> str:
    return write_pairs(tmp_path_factory.mktemp("data"), 4, 8, size=16)


class Job:
    """A training in a folder of its own."""

    def __init__(
        self,
        slurm: Cluster,
        folder: Path,
        urls: str,
        *options: str,
        words: tuple[str, ...] = (),
        script: Path = TRAIN,
        nodes: str = "n[1-2]",
        **launch: str,
    ) -> None:
        folder.mkdir(exist_ok=True)
        self.slurm, self.folder, self.run = slurm, folder, folder / "run"
        words = (f"train.samples={8 * STEPS}", "checkpoint.every_steps=1000", *words)
        options = ("--gpus-per-node=0", "--ntasks-per-node=1", "--cpus-per-task=1", "--time=30", *options)
        options = (*options, f"--output={folder}/%a.out", f"--nodelist={nodes}")
        environment = {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo", "CLIPSCALE_FAULT": "slow@*:*"}
        environment |= {"CLIPSCALE_SITE": str(folder / "none"), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        environment |= {"PATH": path()} | launch
        self.id = slurm.submit(script, write_config(folder, urls), *words, options=options, **environment)

    def task(self, number: int) -> Job:
        """Of an array, with run.dir=run/$SLURM_ARRAY_TASK_ID."""
        task = copy(self)
        task.id, task.run = f"{self.id}_{number}", self.run / str(number)
        return task

    def rows(self) -> list[dict]:
        path = self.run / "metrics.jsonl"
        return (
            [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []
        )

    def until_step(self, step: int) -> None:
        def there() -> bool:
            assert self.slurm.fact(self.id, "JobState") not in ("FAILED", "CANCELLED"), self.said()
            return len(self.rows()) >= step

        until(there, 400, f"step {step} is not reached: {self.said()}")

    def said(self) -> str:
        return "".join(path.read_text() for path in self.folder.glob("*.out"))

    def assert_equals(self, twin: Job) -> None:
        self.slurm.wait(twin.id, "COMPLETED")
        assert restarts(twin) == 0
        assert [row["step"] for row in self.rows()] == list(range(1, STEPS + 1))
        assert [row["loss"] for row in self.rows()] == [row["loss"] for row in twin.rows()]
        one, other = (load_checkpoint(find_checkpoint(str(job.run))) for job in (self, twin))
        assert one.step == other.step == STEPS
        assert all(torch.equal(one.model[key], other.model[key]) for key in other.model)


@pytest.fixture(scope="module")
def twin(slurm, urls, tmp_path_factory) -> Job:
    """Nothing happens to it."""
    return Job(slurm, tmp_path_factory.mktemp("twin"), urls)


def path() -> str:
    """On which `python` is the one that runs the tests."""
    return f"{Path(sys.executable).parent}:{os.environ['PATH']}"


def restarts(job: Job) -> int:
    return int(job.slurm.fact(job.id, "Restarts"))


def high_priority(slurm: Cluster, nodes: str) -> None:
    """A job that takes these nodes whole, and whoever is there has to go."""
    options = ("--partition=high", f"--nodelist={nodes}", "--ntasks-per-node=1", "--exclusive", "--output=/dev/null")
    slurm.call("sbatch", "--parsable", *options, "--wrap", "sleep 3")


def assert_went_on(job: Job, twin: Job) -> None:
    """Put back once, without a step lost."""
    until(lambda: restarts(job) == 1, 120, f"it is not put back: {job.said()}")
    job.slurm.wait(job.id, "COMPLETED")
    assert restarts(job) == 1
    job.assert_equals(twin)
    attempts = (job.run / "attempts.jsonl").read_text().splitlines()
    first, second = map(json.loads, attempts)
    assert (first["restart"], second["restart"]) == (0, 1)
    assert second["step"] >= 5, "no step was lost"
    assert not (job.run / "metrics.superseded.jsonl").exists()


# --- at once ----------------------------------------------------------------------------------------------------------

Scenario = Callable[[Cluster, str, Job, Path], None]
AT_ONCE: list[Scenario] = []


def at_once(scenario: Scenario) -> Callable[[dict[str, Future]], None]:
    """A test of how it went; all of them begin with the first."""
    AT_ONCE.append(scenario)

    def test(together: dict[str, Future]) -> None:
        together[scenario.__name__].result()

    return test


@pytest.fixture(scope="module")
def together(slurm, urls, twin, tmp_path_factory) -> Iterator[dict[str, Future]]:
    with ThreadPoolExecutor(len(AT_ONCE)) as pool:
        folders = [tmp_path_factory.mktemp("job") for _ in AT_ONCE]
        yield {
            scenario.__name__: pool.submit(scenario, slurm, urls, twin, folder)
            for scenario, folder in zip(AT_ONCE, folders, strict=True)
        }


@at_once
def test_a_job_that_is_told_to_leave_goes_on_as_if_nothing_had_been(slurm, urls, twin, folder):
    job = Job(slurm, folder, urls)
    job.until_step(5)
    slurm.call("scancel", "--batch", "--signal=USR1", job.id)
    assert_went_on(job, twin)


@at_once
def test_the_end_of_its_time_puts_a_job_back(slurm, urls, twin, folder):
    words = ("run.leave_before_seconds=1765", "train.samples=100_000")  # of half an hour
    job = Job(slurm, folder, urls, "--signal=B:USR1@5", words=words)
    until(lambda: restarts(job) == 1, 400, f"it is not put back: {job.said()}")
    slurm.call("scancel", job.id)
    assert "the time limit" in job.said()


@at_once
def test_a_job_that_is_cancelled_saves_and_does_not_come_back(slurm, urls, twin, folder):
    job = Job(slurm, folder, urls, words=("train.samples=100_000",))
    job.until_step(5)
    slurm.call("scancel", job.id)
    slurm.wait(job.id, "CANCELLED")
    until((job.run / "interrupted.json").exists, 30, f"it did not save: {job.said()}")
    marker = json.loads((job.run / "interrupted.json").read_text())
    assert load_checkpoint(find_checkpoint(str(job.run))).step == marker["step"] >= 5
    assert restarts(job) == 0


@at_once
def test_what_a_person_must_mend_does_not_come_back(slurm, urls, twin, folder):
    job = Job(slurm, folder, urls, words=("train.global_batch=7",))
    slurm.wait(job.id, "FAILED")
    assert restarts(job) == 0
    assert "train.global_batch=7 is not divisible by the 2 ranks" in job.said()


@at_once
def test_a_job_that_lost_a_rank_comes_back(slurm, urls, twin, folder):
    job = Job(slurm, folder, urls, words=("checkpoint.every_steps=3",))
    job.until_step(5)
    until(lambda: len(read_beats(job.run)) == 2, 60, "rank 1 tells nothing")
    os.kill(read_beats(job.run)[1].pid, signal.SIGKILL)
    until(lambda: restarts(job) == 1, 120, f"it is not put back: {job.said()}")
    slurm.wait(job.id, "COMPLETED")
    job.assert_equals(twin)


@at_once
def test_a_task_of_an_array_comes_back_alone_also_under_torchrun(slurm, urls, twin, folder):
    """And not by one of its failures: torchrun leaves with 1 whatever its ranks say."""
    words = (f"run.dir={folder}/run/$SLURM_ARRAY_TASK_ID",)
    launch = {"LAUNCH": "torchrun", "RANKS_PER_NODE": "1", "MAX_RESTARTS": "0"}
    job = Job(slurm, folder, urls, "--array=0-1", words=words, **launch)
    first, second = job.task(0), job.task(1)
    first.until_step(3)
    slurm.call("scancel", "--batch", "--signal=USR1", first.id)
    until(lambda: restarts(first) == 1, 120, f"it is not put back: {job.said()}")
    for task in (first, second):
        slurm.wait(task.id, "COMPLETED")
        task.assert_equals(twin)
    assert (restarts(first), restarts(second)) == (1, 0)


# --- also at once, on other nodes -------------------------------------------------------------------------------------


@at_once
def test_a_job_that_lost_a_node_comes_back_and_is_evaluated_afterwards(slurm, urls, twin, folder):
    job = Job(slurm, folder / "job", urls, words=("checkpoint.every_steps=3",), nodes="n[3-4]")
    options = (f"--dependency=afterany:{job.id}", "--gpus-per-node=0", "--ntasks-per-node=1", "--cpus-per-task=1")
    options = (*options, "--time=10", "--nodelist=n3", f"--output={folder}/eval.out")
    environment = {"PYTHONPATH": str(ROOT), "CLIPSCALE_SITE": str(folder / "none"), "PATH": path()}
    evaluation = slurm.submit(EVAL, str(job.run), options=options, **environment)
    job.until_step(5)
    slurm.lose_node("n4")
    slurm.begin_node("n4")  # it comes back into service by itself (ReturnToService=2)
    until(lambda: restarts(job) >= 1, 120, f"it is not put back: {job.said()}")
    slurm.wait(job.id, "COMPLETED")
    job.assert_equals(twin)
    slurm.wait(evaluation, "FAILED")  # this run has no labelled pictures, and says so
    assert "no pictures to classify" in (folder / "eval.out").read_text()


@at_once
def test_a_job_that_is_preempted_goes_on_as_if_nothing_had_been(slurm, urls, twin, folder):
    slurm.wait(twin.id, "COMPLETED")  # the others have begun: so many imports at once are enough
    job = Job(slurm, folder, urls, "--exclusive", nodes="n[5-6]")
    job.until_step(5)
    high_priority(slurm, "n[5-6]")
    assert_went_on(job, twin)


def preempt_the_deaf(slurm: Cluster, urls: str, twin: Job, folder: Path, nodes: str, *options: str) -> Job:
    slurm.wait(twin.id, "COMPLETED")  # as above
    plain = folder / "train.sbatch"
    plain.write_text("".join(line for line in TRAIN.open() if "--signal=" not in line))
    job = Job(slurm, folder, urls, *options, words=("checkpoint.every_steps=3",), script=plain, nodes=nodes)
    job.until_step(2)
    high_priority(slurm, nodes)
    until(lambda: restarts(job) == 1, 120, f"it is not put back: {job.said()}")
    slurm.wait(job.id, "COMPLETED")
    assert restarts(job) == 1
    job.assert_equals(twin)
    return job


@at_once
def test_preemption_of_a_job_that_hears_no_signal_of_its_own(slurm, urls, twin, folder):
    """Slurm's SIGTERM goes to the ranks only."""
    assert "back into the queue: SIGTERM" in preempt_the_deaf(slurm, urls, twin, folder, "n[7-8]").said()


@at_once
def test_preemption_without_a_grace(slurm, urls, twin, folder):
    """Slurm has put the job back before its ranks have saved."""
    job = preempt_the_deaf(slurm, urls, twin, folder, "n[9-10]", "--partition=sharp")
    assert "back into the queue" not in job.said(), "Slurm had done it"
