from pathlib import Path

import pytest
import torch

from clipscale.config.data import Replay
from clipscale.data.load.replay_plan import Budgets, Plan, budgets, choose_tier, host_memory, tightest
from clipscale.data.load.shape import StepShape
from clipscale.errors import UserError

MB = 10**6
# 1,000 pictures of 3 x 100 x 100 bytes: 30 MB a step in 10 chunks of 3 MB; two ranks on the node.
SHAPE = StepShape(slots=1000, chunk=100, side=100, ahead=5)


def plan(kind: str = "auto", *, gpu: int | None = None, host: int = 0, disk: int | None = None):
    chosen = choose_tier(Replay(kind=kind, dir="x"), SHAPE, Budgets(gpu, host, disk), local_ranks=2)
    return chosen.kind, chosen.blocks


@pytest.mark.parametrize(
    ("budget", "wanted"),
    [
        ({"gpu": 30 * MB, "host": 500 * MB, "disk": 500 * MB}, ("gpu", 5)),
        ({"gpu": 30 * MB - 1, "host": 500 * MB, "disk": 500 * MB}, ("host", 15)),
        ({"gpu": 30 * MB, "host": 2 * 9 * MB, "disk": None}, ("gpu", 3)),  # memory for three blocks a rank
        ({"host": 2 * 13 * 3 * MB, "disk": 500 * MB}, ("host", 13)),  # ten that wait, three that are filled
        ({"host": 2 * 13 * 3 * MB - 1, "disk": 60 * MB}, ("disk", 5)),
    ],
)
def test_auto_takes_the_first_that_fits(budget, wanted):
    assert plan(**budget) == wanted


def test_what_is_asked_for_is_what_one_gets():
    everything = {"gpu": 500 * MB, "host": 500 * MB, "disk": 500 * MB}
    for kind in ("gpu", "host", "disk", "recompute"):
        assert plan(kind, **everything)[0] == kind
    assert plan("recompute", host=20 * MB) == ("recompute", 3)


def test_when_nothing_fits_the_arithmetic_is_told():
    with pytest.raises(UserError) as refused:
        plan(gpu=29 * MB, host=77 * MB, disk=59 * MB)
    message = str(refused.value)
    assert "1,000 pictures of 30,000 bytes on each of 2 ranks" in message
    assert "gpu: 30,000,000 bytes needed, replay.gpu_bytes allows 29,000,000 bytes" in message
    assert "78,000,000 bytes of host memory needed (10 blocks that wait and 3 being filled, of 100 pictures" in message
    assert "disk: 60,000,000 bytes needed, replay.disk_bytes allows 59,000,000 bytes" in message
    assert "replay.kind=recompute" in message
    assert "\n" not in message


@pytest.mark.parametrize(("kind", "why"), [("gpu", "has none"), ("disk", "replay.dir is not set")])
def test_a_tier_that_is_not_there(kind, why):
    with pytest.raises(UserError, match=rf"replay.kind={kind}: .*{why}"):
        plan(kind, host=500 * MB)


def test_even_recomputing_needs_memory_for_the_blocks_in_flight():
    with pytest.raises(UserError, match="18,000,000 bytes of host memory needed"):
        plan("recompute", host=17 * MB)


def test_every_rank_takes_the_decision_of_the_tightest():
    a, b = Budgets(gpu=5, host=7, disk=9), Budgets(gpu=6, host=4, disk=None)
    assert tightest([a, b]) == Budgets(gpu=5, host=4, disk=None)
    assert tightest([a]) == a


@pytest.mark.parametrize("disk_bytes", [None, 1000])
def test_a_folder_that_cannot_be_made_is_one_line(tmp_path, disk_bytes):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"replay\.dir='.*file' cannot be made: .*; choose a folder"):
        budgets(Replay(dir=str(tmp_path / "file"), disk_bytes=disk_bytes), torch.device("cpu"))


def test_budgets_default_to_shares_of_the_machine(tmp_path):
    cpu = torch.device("cpu")
    found = budgets(Replay(dir=str(tmp_path / "new")), cpu)
    assert found.gpu is None
    assert 0.3 * host_memory().left < found.host < 0.7 * host_memory().left
    assert found.disk > 0
    assert budgets(Replay(host_bytes=3), cpu) == Budgets(None, 3, None)
    total = (
        int(
            next(
                line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal")
            ).split()[1]
        )
        * 1024
    )
    assert 0 < host_memory().left < total == host_memory().total


GB = 2**30


def write_group(folder: Path, files: tuple[str, str], limit: int | str, usage: int, prefix: str = "") -> None:
    """A control group: of its usage, 10 GB are cached files and the rest is taken."""
    folder.mkdir(parents=True, exist_ok=True)
    stat = {"active_file": 4 * GB, "inactive_file": 6 * GB, "anon": usage - 10 * GB}
    rows = [f"{prefix}{name} {value}\n" for name, value in stat.items()]
    for name, text in ((files[0], f"{limit}\n"), (files[1], f"{usage}\n"), ("memory.stat", "".join(rows))):
        (folder / name).write_text(text)


V2, V1 = ("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")


@pytest.mark.parametrize(
    ("membership", "folder", "files", "prefix"),
    [
        ("0::/", "", V2, ""),  # in a container, which sees its own group as the root
        ("0::/slurm/job_7/step_0", "slurm/job_7", V2, ""),  # the limit is the job's, one above
        ("5:cpu,memory:/slurm/job_7\n0::/", "memory/slurm/job_7", V1, "total_"),
        ("5:memory:/docker/3018c\n0::/", "memory", V1, "total_"),  # named as the host sees it
    ],
)
def test_memory_is_what_the_control_group_leaves_and_cached_files_give_way(tmp_path, membership, folder, files, prefix):
    proc, groups = tmp_path / "proc", tmp_path / "groups"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text(f"MemTotal: {2**30} kB\nMemAvailable: {500 * 2**20} kB\n")
    (proc / "self" / "cgroup").write_text(membership + "\n")
    assert host_memory(proc, groups).left == 500 * GB
    write_group(groups / folder, files, 64 * GB, 63 * GB, prefix)
    assert host_memory(proc, groups).left == 11 * GB
    write_group(groups / folder, files, 2**63 - 4096, 63 * GB, prefix)  # as version 1 says 'no limit'
    assert host_memory(proc, groups).left == 500 * GB
    write_group(groups / folder, files, "max", 63 * GB, prefix)
    assert host_memory(proc, groups).left == 500 * GB


def write_meminfo(proc: Path, total: int, available: int) -> None:
    (proc / "self").mkdir(parents=True, exist_ok=True)
    sizes = f"MemTotal: {total >> 10} kB\nMemAvailable: {available >> 10} kB\n"
    (proc / "meminfo").write_text(sizes + "HugePages_Total: 0\n")


def test_a_groups_throttle_is_a_limit_too(tmp_path):
    proc, groups = tmp_path / "proc", tmp_path / "groups"
    write_meminfo(proc, 500 * GB, 400 * GB)
    (proc / "self" / "cgroup").write_text("0::/\n")
    write_group(groups, ("memory.high", "memory.current"), 64 * GB, 63 * GB)
    assert host_memory(proc, groups) == (500 * GB, 400 * GB, 11 * GB)
    assert str(host_memory(proc, groups)) == (
        "MemAvailable 429.5 GB of MemTotal 536.9 GB, its control group leaves 11.8 GB"
    )


@pytest.fixture
def small_start(tmp_path, monkeypatch):
    """A machine that shows 64 MB of the memory that it can grow to."""
    write_meminfo(tmp_path, 80 * MB, 64 * MB)
    monkeypatch.setattr("clipscale.data.load.replay_plan.host_memory", lambda: host_memory(tmp_path, tmp_path))


def test_where_memory_grows_on_demand_a_budget_is_taken_as_it_is(small_start, told):
    """500 MB hold a step of both ranks and all that is decoded ahead; what is seen does not."""
    replay = Replay(host_bytes=500 * MB)
    assert choose_tier(replay, SHAPE, budgets(replay, torch.device("cpu")), local_ranks=2) == Plan("host", 15)
    (line,) = told
    assert line.startswith(
        "replay.host_bytes=500,000,000 is more than this node has left (MemAvailable 64,000,000 bytes of"
    )


def test_without_a_budget_what_was_seen_and_what_overrides_it_are_told(small_start, tmp_path, told):
    """32 MB: the disk instead of the host, with fewer chunks ahead; where there is no disk, an error."""
    replay, ahead = Replay(dir=str(tmp_path / "replay")), StepShape(slots=1000, chunk=100, side=100, ahead=9)
    found = choose_tier(replay, ahead, budgets(replay, torch.device("cpu")), local_ranks=2)
    assert (found.kind, found.blocks) == ("disk", 5)
    slower, fewer = found.notes
    seen = "half of what this node has left (MemAvailable 64,000,000 bytes of MemTotal "
    assert slower.startswith("replay.kind=auto: disk, for want of memory: host: 78,000,000 bytes of host memory needed")
    assert fewer.startswith("5 chunks of pictures are decoded ahead, not 9, for want of memory: half of what")
    for note in found.notes:
        assert seen in note
        assert "MemTotal 80,000,000 bytes; replay.host_bytes says otherwise) allows 32,000,000 bytes" in note
    with pytest.raises(
        UserError, match=r"replay.kind=auto: .*MemAvailable 64,000,000 .*replay.host_bytes says otherwise"
    ):
        choose_tier(Replay(), ahead, budgets(Replay(), torch.device("cpu")), local_ranks=2)
    assert told == []
