"""clipscale/dist.py: how the ranks are joined. The ranks themselves: tests/test_ranks.py."""

import pytest
import torch
import torch.distributed as dist

from clipscale.dist import World, start_world
from clipscale.errors import SharedError


class Joined(Exception):
    pass


@pytest.mark.parametrize(("device", "backend"), [("cpu", "gloo"), ("cuda", "nccl")])
def test_only_nccl_is_asked_for_streams_of_high_priority(monkeypatch, device, backend):
    told = {}

    def join(name, **options):
        told.update(options, backend=name)
        raise Joined

    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda gpu: None)
    monkeypatch.setattr(dist, "init_process_group", join)
    monkeypatch.setattr(dist, "rendezvous", lambda url, rank, size, timeout: iter([(dist.HashStore(), rank, size)]))
    with pytest.raises(Joined), start_world(device):
        pass
    assert told["backend"] == backend
    options = told["pg_options"]
    if device == "cpu":
        assert options is None
    else:
        assert options.is_high_priority_stream
        assert options._timeout == told["timeout"], "or torch warns"


class Pair(World):
    """A rank of two, that hears of the other's problem, or of none."""

    heard = ""

    def gather(self, item, *, patient=False):
        return [item, self.heard]


def test_an_error_of_any_rank_is_everyones(monkeypatch):
    world = Pair(0, 2, 0, torch.device("cpu"))
    assert world.each(lambda: 7) == 7
    with pytest.raises(SharedError, match=r"^KeyError: 'mine'$") as raised:
        world.each(lambda: {}["mine"])
    assert isinstance(raised.value.__cause__, KeyError)
    monkeypatch.setattr(Pair, "heard", "a.tar: it is gone")
    with pytest.raises(SharedError, match="it is gone"):
        world.each(lambda: 7)
