"""A real Slurm on this machine for tests: its own controller and two nodes, which leave nothing behind."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

NODES = ("n1", "n2")
PROGRAMS = ("slurmctld", "slurmd", "munged", "srun", "sbatch", "scontrol", "squeue")
CONFIGURATION = """
ClusterName=msvae
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
MpiDefault=none
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=30
ReturnToService=2
{nodes}
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime=120 MaxTime=INFINITE
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF MaxTime=INFINITE
"""


class Slurm:
    """Slurm with a partition `low`, whose jobs are pre-empted with two minutes' notice, and a partition `high`."""

    def __init__(self, folder: Path) -> None:
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}

    def run(self, *command: object, cwd: Path | None = None) -> str:
        """Run a Slurm command and return its output."""
        done = subprocess.run(
            [str(word) for word in command], env=self.environment, cwd=cwd, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def submit(self, *words: object, cwd: Path) -> str:
        """Submit a job and return its id."""
        return self.run("sbatch", "--parsable", *words, cwd=cwd).strip()

    def field(self, job: str, name: str) -> str:
        """Return a field of `scontrol show job`."""
        words = self.run("scontrol", "show", "job", job).split()
        return next(word.split("=", 1)[1] for word in words if word.startswith(f"{name}="))

    def wait_until(self, condition: Callable[[], bool], timeout_s: float = 300) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, self.run("scontrol", "show", "job")
            time.sleep(0.2)


@contextmanager
def slurm_cluster(folder: Path) -> Iterator[Slurm]:
    """Start a cluster of two nodes. Skip the test if Slurm or munge is not installed."""
    if missing := [name for name in PROGRAMS if shutil.which(name) is None]:
        pytest.skip(f"{missing[0]} is not installed (Debian: slurm-wlm, munge)")
    if os.geteuid():
        pytest.skip("Slurm's daemons need root")
    for name in ("state", *(f"spool-{node}" for node in NODES)):
        (folder / name).mkdir(parents=True)
    controller, *ports = free_ports(1 + len(NODES))
    host = socket.gethostname()
    lines = [
        f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=1 State=UNKNOWN"
        for node, port in zip(NODES, ports, strict=True)
    ]
    configuration = CONFIGURATION.format(host=host, controller=controller, folder=folder, nodes="\n".join(lines))
    (folder / "slurm.conf").write_text(configuration)
    slurm = Slurm(folder)
    with ExitStack() as daemons:
        daemons.enter_context(munge(folder))
        for name, command in (
            ("slurmctld", ["slurmctld", "-D"]),
            *((f"slurmd {node}", ["slurmd", "-D", "-N", node]) for node in NODES),
        ):
            daemons.enter_context(daemon([*command, "-f", str(folder / "slurm.conf")], folder / f"{name}.out", slurm))
        slurm.wait_until(lambda: slurm.run("sinfo", "-h", "-p", "low", "-t", "idle", "-o", "%D").strip() == "2", 60)
        try:
            yield slurm
        finally:
            slurm.run("scancel", "--user", "root")
            slurm.wait_until(lambda: not slurm.run("squeue", "-h"), 60)


@contextmanager
def munge(folder: Path) -> Iterator[None]:
    """Run munge with its own key and socket, independent of a munge of the system."""
    key, socket_path = folder / "munge.key", folder / "munge.socket"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o600)
    names = {
        "key-file": key,
        "socket": socket_path,
        "pid-file": folder / "munge.pid",
        "log-file": folder / "munge.log",
    }
    names["seed-file"] = folder / "munge.seed"
    command = ["munged", "--foreground", "--force", *(f"--{name}={path}" for name, path in names.items())]
    with daemon(command, folder / "munged.out"):
        deadline = time.monotonic() + 20
        while not socket_path.exists():
            assert time.monotonic() < deadline, (folder / "munged.out").read_text()
            time.sleep(0.05)
        yield


@contextmanager
def daemon(command: list[str], log: Path, slurm: Slurm | None = None) -> Iterator[None]:
    """Run a command in its own session, and end it when the block ends."""
    with log.open("w") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=file, env=slurm.environment if slurm else None, start_new_session=True
        )
        try:
            yield
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def free_ports(number: int) -> list[int]:
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(number)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]
