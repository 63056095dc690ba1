"""Where a process finds its place among the ranks: told by torchrun, by Slurm's srun, or by nobody."""

import os
import re
import socket

import pytest

from clipscale.errors import UserError
from clipscale.launch import first_host, launched

SRUN = {
    "SLURM_PROCID": "3",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_JOB_ID": "41",
    "SLURM_STEP_ID": "0",
}


def unknown(name, port):
    raise socket.gaierror(-2, "Name or service not known")


@pytest.fixture
def told(monkeypatch):
    """A function: what a launcher says -> (the place, MASTER_ADDR, MASTER_PORT). Each node's name is an address."""
    monkeypatch.setattr(socket, "getaddrinfo", lambda name, port: [])

    def told(**variables: str):
        for name in list(os.environ):
            if name.startswith("SLURM_") or name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
                monkeypatch.delenv(name)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        return launched(), os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")

    yield told
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)


def test_srun_tells_place_and_meeting_point(told):
    assert told(**SRUN) == ((3, 4, 1), "n1", "20041")


def test_what_is_set_already_holds(told, monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    assert told(**SRUN, MASTER_ADDR="10.0.0.7", MASTER_PORT="5000") == ((3, 4, 1), "10.0.0.7", "5000")


def test_each_step_and_each_restart_meets_at_a_port_of_its_own(told):
    ports = {told(**SRUN | {"SLURM_STEP_ID": s, "SLURM_RESTART_COUNT": r})[2] for s in "012" for r in "012"}
    assert len(ports) == 9
    assert all(20000 <= int(port) < 30000 for port in ports)


def test_torchrun_within_srun_is_the_one_that_counts(told):
    assert told(**SRUN, RANK="1", WORLD_SIZE="2", LOCAL_RANK="1")[0] == (1, 2, 1)


@pytest.mark.parametrize("variables", [{}, SRUN | {"SLURM_STEP_NUM_TASKS": "1"}], ids=["nobody", "one task"])
def test_alone(told, variables):
    assert told(**variables | {"SLURM_PROCID": "0"} if variables else {}) == ((0, 1, 0), None, None)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("gpu[007-009,012],x2", "gpu007"),
        ("gpu[7,9]-ib", "gpu7-ib"),
        ("rack[2-3]node[10-19],a", "rack2node10"),
        ("a.site.org,b.site.org", "a.site.org"),
    ],
)
def test_the_first_of_a_list_of_nodes(monkeypatch, nodes, first):
    monkeypatch.setattr(socket, "getaddrinfo", lambda name, port: [])
    assert first_host(nodes) == first


def test_a_node_without_an_address_is_told_at_once(monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(UserError, match=re.escape("Slurm's node n1 has no address on")) as raised:
        first_host("n[1-2]")
    assert "export MASTER_ADDR" in str(raised.value)
