"""A real Slurm of ten nodes on this host, for tests: no cgroups, no accounting, nothing outside one folder.

with cluster(folder) as slurm:
    job = slurm.submit("slurm/train.sbatch", "tiny.yaml")
    slurm.wait(job, "COMPLETED")
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

CONF = """
ClusterName=clipscale-tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={run}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={run}/state
SlurmdSpoolDir={run}/spool.%n
SlurmctldPidFile={run}/slurmctld.pid
SlurmdPidFile={run}/slurmd.%n.pid
SlurmctldLogFile={run}/slurmctld.log
SlurmdLogFile={run}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=2,bf_window=120,sched_min_interval=100000
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=60
InactiveLimit=0
KillWait=10
MinJobAge=600
JobRequeue=1
JobFileAppend=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
{nodes}
PartitionName=low  Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=60 MaxTime=60 State=UP
PartitionName=sharp Nodes=ALL Default=NO PriorityTier=1 PreemptMode=REQUEUE GraceTime=0 MaxTime=60 State=UP
PartitionName=high Nodes=ALL Default=NO PriorityTier=10 PreemptMode=OFF MaxTime=60 State=UP
"""
# cred_expire is also how long a job that was put back must wait.
NODE = "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=16 RealMemory=8000 State=UNKNOWN"
NODES = [f"n{number}" for number in range(1, 11)]  # with more cores than the host has


class Cluster:
    def __init__(self, run: Path) -> None:
        self.run = run
        self._processes: dict[str, subprocess.Popen] = {}
        port, *ports = _free_ports(1 + len(NODES))
        host, user = socket.gethostname().partition(".")[0], os.environ.get("USER", "root")
        nodes = [NODE.format(name=name, host=host, port=its) for name, its in zip(NODES, ports, strict=True)]
        conf = CONF.format(host=host, user=user, run=run, port=port, nodes="\n".join(nodes))
        (run / "slurm.conf").write_text(conf)
        self.environment = os.environ | {"SLURM_CONF": str(run / "slurm.conf")}

    # --- the daemons --------------------------------------------------------------------------------------------------

    def start(self) -> None:
        key = self.run / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(1024))
        for name in ("state", *(f"spool.{node}" for node in NODES)):
            (self.run / name).mkdir()
        files = {name: f"--{name}={self.run / 'munged'}.{name}" for name in ("pid-file", "log-file", "seed-file")}
        socket_file = f"--socket={self.run / 'munge.socket'}"
        self._begin("munged", "munged", "--foreground", "--force", f"--key-file={key}", socket_file, *files.values())
        until(lambda: (self.run / "munge.socket").exists(), 20, "munged does not come up")
        self._begin("slurmctld", "slurmctld", "-D")
        for node in NODES:
            self.begin_node(node)
        until(self._idle, 60, "Slurm does not come up")

    def begin_node(self, node: str) -> None:
        self._begin(node, "slurmd", "-D", "-N", node)

    def lose_node(self, node: str) -> None:
        """Its daemon is gone, and so are its tasks."""
        daemon = self._processes.pop(node)
        for pid in _descendants(daemon.pid):
            os.kill(pid, signal.SIGKILL)
        daemon.kill()
        daemon.wait()
        self.call("scontrol", "update", f"nodename={node}", "state=down", "reason=test")

    def stop(self) -> None:
        subprocess.run(["scancel", "--user", "root"], env=self.environment, capture_output=True, check=False)
        for name in (*NODES, "slurmctld", "munged"):
            if process := self._processes.pop(name, None):
                for pid in _descendants(process.pid) if name in NODES else ():  # the jobs' processes
                    os.kill(pid, signal.SIGKILL)
                process.terminate()  # slurmctld would wait in vain for a helper of its own that was killed
                try:
                    process.wait(30)
                except subprocess.TimeoutExpired:
                    process.kill()

    def _begin(self, name: str, *command: str) -> None:
        with (self.run / f"{name}.out").open("a") as out:
            self._processes[name] = subprocess.Popen(command, stdout=out, stderr=out, env=self.environment)

    def _idle(self) -> bool:
        done = subprocess.run(
            ["sinfo", "-h", "-p", "low", "-t", "idle", "-o", "%D"],
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
        )
        return sum(map(int, done.stdout.split())) == len(NODES)

    # --- jobs ---------------------------------------------------------------------------------------------------------

    def call(self, *command: str, **environment: str) -> str:
        env = self.environment | environment
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def submit(self, script: Path, *words: str, options: tuple[str, ...] = (), **environment: str) -> str:
        return self.call("sbatch", "--parsable", *options, str(script), *words, **environment)

    def fact(self, job: str, name: str) -> str:
        match = re.search(rf"\b{name}=(\S+)", self.call("scontrol", "show", "job", "--oneliner", job))
        return match[1]

    def wait(self, job: str, state: str, seconds: float = 400) -> None:
        last = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")

        def reached() -> bool:
            found = self.fact(job, "JobState")
            assert found == state or found not in last, f"job {job} has {found}, not {state}"
            return found == state

        def what() -> str:
            return f"job {job} does not become {state}: {self.fact(job, 'JobState')}, {self.fact(job, 'Reason')}"

        until(reached, seconds, what)


@contextmanager
def cluster(run: Path) -> Iterator[Cluster]:
    found = Cluster(run)
    try:
        found.start()
        yield found
    finally:
        found.stop()


def until(condition: Callable[[], bool], seconds: float, what: str | Callable[[], str]) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what() if callable(what) else what
        time.sleep(0.5)


def present() -> bool:
    return all(shutil.which(name) for name in ("munged", "slurmctld", "slurmd", "sbatch", "srun")) and os.geteuid() == 0


def _free_ports(number: int) -> list[int]:
    probes = [socket.socket() for _ in range(number)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()


def _descendants(pid: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            found += [int(path.parent.name), *_descendants(int(path.parent.name))]
    return found
