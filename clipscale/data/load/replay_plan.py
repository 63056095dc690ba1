"""Which tier of the replay buffer a run gets, and how many blocks its loader: arithmetic on budgets, before it starts.

    shape = StepShape(slots=131_072, chunk=256, side=224, ahead=14)
    plan = choose_tier(config.replay, shape, budgets(config.replay, device), local_ranks=8)
    plan                                                                  # Plan(kind='host', blocks=526, notes=())

A rank's step is n chunks of M pictures. The loader fills `ahead` more while the step is computed. In the host tier all
n + ahead lie in memory, each in a block of its own; in the others `ahead` do.

How much memory a node has is what the person says (`replay.host_bytes`), else a share of what the node shows. That may
be too little where memory grows on demand (small virtual machines): whatever is smaller for it says what was seen.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch

from clipscale.config.data import Replay
from clipscale.data.load.replay import Disk, Gpu, Host, Recompute
from clipscale.data.load.shape import StepShape
from clipscale.errors import UserError, reason
from clipscale.tell import tell
from clipscale.words import counted

_NO_LIMIT = 2**60  # bytes
_LEAST_AHEAD = 3  # chunks, whatever shape.ahead says: one is computed on, one is copied, one is filled
Tier = Host | Gpu | Disk | Recompute


@dataclass(frozen=True)
class Budgets:
    """Bytes. Those of host and disk are the node's, over its ranks; None: there is no such place."""

    gpu: int | None
    host: int
    disk: int | None
    host_from: str = "replay.host_bytes"  # where the host's figure comes from


@dataclass(frozen=True)
class Plan:
    kind: str
    blocks: int  # R, of the loader's shared memory
    notes: tuple[str, ...] = ()  # what is less than it would be with more memory, and why


class HostMemory(NamedTuple):
    """Bytes, as a node shows them now."""

    total: int  # of the node
    available: int  # without swapping
    group: int | None  # what the tightest control group of this process leaves; None: no limit

    @property
    def left(self) -> int:
        return self.available if self.group is None else min(self.available, self.group)

    def __str__(self) -> str:
        group = "" if self.group is None else f", its control group leaves {_gb(self.group)}"
        return f"MemAvailable {_gb(self.available)} of MemTotal {_gb(self.total)}{group}"


def budgets(replay: Replay, device: torch.device) -> Budgets:
    """As the config sets them, else a share of what this machine has. Makes replay.dir.

    Raises:
        UserError: replay.dir cannot be made.
    """
    gpu = None
    if device.type == "cuda":
        gpu = replay.gpu_bytes
        if gpu is None:
            gpu = torch.cuda.get_device_properties(device).total_memory // 20
    seen, host, host_from = host_memory(), replay.host_bytes, Budgets.host_from
    if host is None:
        host, host_from = seen.left // 2, f"half of what this node has left ({seen}; replay.host_bytes says otherwise)"
    elif host > seen.left:
        tell(f"replay.host_bytes={host:,} is more than this node has left ({seen}): taken as it is, memory may grow")
    disk = None
    if replay.dir is not None:
        try:
            Path(replay.dir).mkdir(parents=True, exist_ok=True)
            disk = shutil.disk_usage(replay.dir).free * 4 // 5 if replay.disk_bytes is None else replay.disk_bytes
        except OSError as error:
            raise UserError(
                f"replay.dir={replay.dir!r} cannot be made: {reason(error)}; choose a folder that can be written"
            ) from error
    return Budgets(gpu, host, disk, host_from)


def tightest(all_ranks: list[Budgets]) -> Budgets:
    """What every rank has: they must take the same decision."""
    gpu, disk = zip(*((budget.gpu, budget.disk) for budget in all_ranks), strict=True)
    host = min(all_ranks, key=lambda budget: budget.host)
    return Budgets(
        gpu=None if None in gpu else min(gpu),
        host=host.host,
        disk=None if None in disk else min(disk),
        host_from=host.host_from,
    )


def host_memory(proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> HostMemory:
    """Of this node, and of the control groups of this process (Slurm's, a container's)."""
    lines = (line.split() for line in (proc / "meminfo").read_text().splitlines())
    sizes = {words[0]: int(words[1]) * 1024 for words in lines}
    left: list[int] = []
    membership = proc / "self" / "cgroup"
    for line in membership.read_text().splitlines() if membership.exists() else ():
        _, controllers, path = line.split(":", 2)
        if not controllers:  # version 2
            left += _group_bytes(groups, path, "memory.max", "memory.current", "")
            left += _group_bytes(groups, path, "memory.high", "memory.current", "")  # above it, all is slowed down
        elif "memory" in controllers.split(","):
            left += _group_bytes(groups / "memory", path, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
    group = min(left, default=None)
    total = sizes["MemTotal:"]
    # Version 1 has no word for "no limit" but the largest number.
    return HostMemory(total, sizes["MemAvailable:"], None if group is None or group >= _NO_LIMIT else group)


def _group_bytes(root: Path, path: str, limit: str, usage: str, prefix: str) -> Iterator[int]:
    """What the group and those above it leave, each that has a limit. Cached files are in their usage, and give way."""
    folder = root / path.lstrip("/")
    for group in (folder, *folder.parents):
        try:
            bound, used = int((group / limit).read_text()), int((group / usage).read_text())
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):  # not there, seen from a container; or 'max': no limit
            continue
        yield bound - used + sum(int(stat[f"{prefix}{kind}_file"]) for kind in ("active", "inactive"))


def choose_tier(replay: Replay, shape: StepShape, budget: Budgets, *, local_ranks: int) -> Plan:
    """The tier asked for; under `auto` the first of gpu, host and disk that fits `local_ranks` ranks of a node.

    Raises:
        UserError: it does not fit, or none does; with the arithmetic.
    """
    kinds = ("gpu", "host", "disk") if replay.kind == "auto" else (replay.kind,)
    problems = []
    for kind in kinds:
        plan = _try(kind, shape, budget, local_ranks)
        if isinstance(plan, Plan):
            if kind == "disk" and problems:  # the last one is the host's, which would be faster
                plan = replace(plan, notes=(f"replay.kind=auto: disk, for want of memory: {problems[-1]}", *plan.notes))
            return plan
        problems.append(f"{kind}: {plan}")
    raise UserError(
        f"replay.kind={replay.kind}: the pixels of a step have no place to wait for the second pass, "
        f"{counted(shape.slots, 'picture')} of {counted(shape.picture_bytes, 'byte')} on each of "
        f"{counted(local_ranks, 'rank')} of this node ({'; '.join(problems)}). Raise a budget, use more ranks or "
        "a smaller train.global_batch, or set replay.kind=recompute, which reads and decodes every picture twice"
    )


def _try(kind: str, shape: StepShape, budget: Budgets, local_ranks: int) -> Plan | str:
    """The plan, or why it cannot be."""
    if kind == "gpu" and budget.gpu is None:
        return "this rank has none"
    if kind == "gpu" and shape.held_bytes > budget.gpu:
        return f"{_gb(shape.held_bytes)} needed, replay.gpu_bytes allows {_gb(budget.gpu)}"
    if kind == "disk" and budget.disk is None:
        return "replay.dir is not set"
    if kind == "disk" and shape.held_bytes * local_ranks > budget.disk:
        return f"{_gb(shape.held_bytes * local_ranks)} needed, replay.disk_bytes allows {_gb(budget.disk)}"
    held = len(shape.held_spans) if kind == "host" else 0
    room = budget.host // (local_ranks * shape.chunk_bytes) - held
    if room < _LEAST_AHEAD:
        least = (held + _LEAST_AHEAD) * shape.chunk_bytes * local_ranks
        return (
            f"{_gb(least)} of host memory needed ({counted(held, 'block')} that wait and {_LEAST_AHEAD} being filled, "
            f"of {counted(shape.chunk, 'picture')}, on each rank), {budget.host_from} allows {_gb(budget.host)}"
        )
    wanted = max(shape.ahead, _LEAST_AHEAD)
    short = (
        f"{counted(room, 'chunk')} of pictures are decoded ahead, not {wanted}, for want of memory: "
        f"{budget.host_from} allows {_gb(budget.host)}",
    )
    return Plan(kind, held + min(room, wanted), short if room < wanted else ())


def build_tier(plan: Plan, replay: Replay, shape: StepShape, device: torch.device) -> Tier:
    """The tier that the plan names.

    Raises:
        UserError: replay.dir cannot be written, or has less room than its budget says.
    """
    if plan.kind == "host":
        return Host()
    if plan.kind == "gpu":
        return Gpu(shape, device)
    if plan.kind == "recompute":
        return Recompute()
    try:
        return Disk(shape, replay.dir, pin=device.type == "cuda")
    except OSError as error:
        size = _gb(shape.held_bytes)
        raise UserError(f"replay.dir={replay.dir!r}: a file of {size} cannot be made there: {reason(error)}") from error


def _gb(count: int) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e8 else counted(count, "byte")
