from pathlib import Path

import pytest
import torch

from clipscale.config_data import Replay
from clipscale.data.load.replay_plan import Budgets, available_bytes, budgets, choose_tier, tightest
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
    assert 0.3 * available_bytes() < found.host < 0.7 * available_bytes()
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
    assert 0 < available_bytes() < total


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
    assert available_bytes(proc, groups) == 500 * GB
    write_group(groups / folder, files, 64 * GB, 63 * GB, prefix)
    assert available_bytes(proc, groups) == 11 * GB
    write_group(groups / folder, files, 2**63 - 4096, 63 * GB, prefix)  # as version 1 says 'no limit'
    assert available_bytes(proc, groups) == 500 * GB
    write_group(groups / folder, files, "max", 63 * GB, prefix)
    assert available_bytes(proc, groups) == 500 * GB
