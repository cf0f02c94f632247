"""launch/node.sh on one and two machines, and the exit codes that schedulers use. Tests launch real runs."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
import pytest
from safetensors.numpy import load_file

from ..conftest import ROOT, tiny_run
from ..distributed.interrupted_runs import PATIENCE_S, PAUSED_TRAIN, RUN, logged, weights
from .slurm import free_ports

NODE = ["bash", str(ROOT / "launch" / "node.sh")]
TRAIN = ROOT / "train" / "train.py"


@pytest.fixture(scope="module")
def undisturbed(launch, leaf_shards, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    done = launch(TRAIN, *tiny_run(leaf_shards, out, **RUN))
    assert done.returncode == 0, done.stderr[-3000:]
    return out


class Nodes:
    """node.sh on two machines, both of which are this machine. The run pauses once, in the evaluation after step 4."""

    def __init__(self, folder: Path, commands: list[list[str]]) -> None:
        folder.mkdir(exist_ok=True)
        self.paused, self.go = folder.parent / "paused", folder.parent / "go"
        pause = {"PAUSE": "evaluation 0 4", "PAUSED": self.paused, "GO": self.go, "PYTHONPATH": ROOT}
        environment = {**os.environ, **{name: str(value) for name, value in pause.items()}}
        self._logs = [folder / f"node-{number}" for number in range(len(commands))]
        self.nodes = [
            psutil.Popen(command, cwd=ROOT, env=environment, stdout=log.open("w"), stderr=subprocess.STDOUT)
            for command, log in zip(commands, self._logs, strict=True)
        ]

    def wait_until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < deadline, self.logs
            assert all(node.poll() is None for node in self.nodes), self.logs
            time.sleep(0.05)

    def rank(self, node: int) -> psutil.Process:
        processes = self.nodes[node].children(recursive=True)
        return next(process for process in processes if "RANK" in process.environ())

    def codes(self) -> list[int]:
        try:
            return [node.wait(PATIENCE_S) for node in self.nodes]
        finally:
            for node in self.nodes:
                for process in [*node.children(recursive=True), node] if node.is_running() else []:
                    process.kill()

    @property
    def logs(self) -> list[str]:
        return [log.read_text() for log in self._logs]


def two_nodes(shards: Path, out: Path, port: int | None = None, nodes: str = "2") -> list[list[str]]:
    meeting = ["--nodes", nodes, "--at", f"127.0.0.1:{port or free_ports(1)[0]}"]
    return [[*NODE, *meeting, str(PAUSED_TRAIN), *tiny_run(shards, out, **RUN)]] * 2


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.slow
def test_a_run_of_two_nodes_ends_with_75_on_both_when_one_is_asked_to_stop_and_then_with_0(
    leaf_shards, undisturbed, tmp_path
):
    """The signals imitate a scheduler that signals every process of a machine."""
    out = tmp_path / "run"
    stopped = Nodes(tmp_path / "stopped", two_nodes(leaf_shards, out))
    stopped.wait_until(stopped.paused.exists)
    for process in [stopped.nodes[1], *stopped.nodes[1].children(recursive=True)]:
        process.send_signal(signal.SIGUSR1)
    stopped.wait_until(lambda: "asked to stop by SIGUSR1" in stopped.logs[1])
    time.sleep(1.5)
    stopped.nodes[1].send_signal(signal.SIGTERM)
    stopped.go.touch()
    assert stopped.codes() == [75, 75], stopped.logs
    assert any("asked to stop: saved at step" in log for log in stopped.logs)
    ended = Nodes(tmp_path / "ended", two_nodes(leaf_shards, out))
    assert ended.codes() == [0, 0], ended.logs
    assert logged(out) == list(range(1, 17))
    for folder in ("model", "best", "untrained"):
        assert weights(out, folder) == weights(undisturbed, folder)


@pytest.mark.slow
def test_a_node_that_lost_another_node_ends_with_69_and_the_lost_node_with_the_launchers_code(leaf_shards, tmp_path):
    run = Nodes(tmp_path / "lost", two_nodes(leaf_shards, tmp_path / "run"))
    run.wait_until(run.paused.exists)
    survivor = next(node for node in range(2) if run.rank(node).environ()["RANK"] == "0")
    run.rank(1 - survivor).kill()
    run.go.touch()
    codes = run.codes()
    assert codes[survivor] == 69, run.logs
    assert codes[1 - survivor] == 1, run.logs


@pytest.mark.slow
def test_an_elastic_run_continues_when_a_machine_is_lost(leaf_shards, undisturbed, tmp_path):
    out, (port,) = tmp_path / "run", free_ports(1)
    first, second = two_nodes(leaf_shards, out, port, "1:2")
    run = Nodes(tmp_path / "first", [first])
    # the first machine hosts the rendezvous, and must not leave
    run.wait_until(lambda: listens(port))
    (lost,) = Nodes(tmp_path / "second", [second]).nodes
    run.wait_until(run.paused.exists)
    assert run.rank(0).environ()["WORLD_SIZE"] == "2"
    for process in [*lost.children(recursive=True), lost]:
        process.kill()
    run.go.touch()
    assert run.codes() == [0], run.logs
    assert logged(out) == list(range(1, 17))
    actual, expected = (load_file(run / "model" / "diffusion_pytorch_model.safetensors") for run in (out, undisturbed))
    for name in expected:
        np.testing.assert_allclose(actual[name], expected[name], rtol=1e-4, atol=1e-5, err_msg=name)


def test_a_wrong_command_is_an_error_of_one_line():
    for words, message in (
        ([], "no script to run; add train/train.py and its options"),
        (["--nodes", "two", "train/train.py"], "--nodes is 'two', expected a number such as 2, or 2:4"),
        (["--nodes", "3:2", "train/train.py"], "--nodes is '3:2', expected the smaller number first"),
        (
            ["--nodes", "2", "train/train.py"],
            "--nodes is 2 but --at is missing; set --at HOST to the machine where all meet",
        ),
        (["--engine", "zero9", "train/train.py"], "--engine is 'zero9', expected the name of a file in configs/"),
        (["--fast", "train/train.py"], "unknown option --fast"),
        (["train/trian.py"], "the file train/trian.py does not exist in "),
        (
            ["--nodes", "2", "--at", "nobody.invalid", "--wait", "1", "train/train.py"],
            "nobody.invalid did not resolve within 1 s; set --at to an address, or to a name that all machines can "
            "resolve",
        ),
        (
            ["--nodes", "2", "--at", "127.0.0.1", "--interface", "moon0", "train/train.py"],
            "--interface is 'moon0', expected one of ",
        ),
    ):
        done = subprocess.run([*NODE, *words], cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.returncode == (69 if "nobody.invalid" in words else 2), words
        (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert message in line


def test_a_user_error_ends_a_node_with_2(leaf_shards, tmp_path):
    words = [*NODE, str(TRAIN), *tiny_run(tmp_path / "nowhere", tmp_path / "run")]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    assert f"error: {tmp_path}/nowhere/train" in done.stderr


@pytest.mark.slow
def test_msvae_doctor_checks_the_machines_that_node_sh_starts(leaf_shards, tmp_path):
    (port,) = free_ports(1)
    doctor = ["--module", "msvae", "doctor", *tiny_run(leaf_shards, tmp_path / "run")]
    nodes = Nodes(tmp_path / "nodes", [[*NODE, "--nodes", "2", "--at", f"127.0.0.1:{port}", *doctor]] * 2)
    assert nodes.codes() == [0, 0], nodes.logs
    (printed,) = [log for log in nodes.logs if "0 faults" in log]
    assert "2 launched, 2 joined, on 2 machines" in printed


@pytest.mark.slow
def test_mpirun_starts_a_run_on_its_machines(leaf_shards, undisturbed, tmp_path):
    """The command of docs/machines.md; both slots are on this machine."""
    if shutil.which("mpirun") is None:
        pytest.skip("mpirun is not installed (Debian: openmpi-bin)")
    (port,) = free_ports(1)
    words = ["mpirun", "--allow-run-as-root", "--host", "localhost:2", "-np", "2", *NODE, "--nodes", "2"]
    words += ["--at", f"localhost:{port}", str(TRAIN), *tiny_run(leaf_shards, tmp_path / "run", **RUN)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr[-3000:]
    assert weights(tmp_path / "run") == weights(undisturbed)


@contextmanager
def ssh_server(folder: Path) -> Iterator[list[str]]:
    """Start a real sshd on loopback with its own keys, and yield the `ssh` command that connects to it."""
    if shutil.which("sshd") is None or os.geteuid():
        pytest.skip("sshd is not installed (Debian: openssh-server), or needs root")
    (port,) = free_ports(1)
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    Path("/run/sshd").mkdir(exist_ok=True)
    settings = {
        "Port": port, "ListenAddress": "127.0.0.1", "HostKey": folder / "host", "PidFile": "none", "UsePAM": "no",
        "AuthorizedKeysFile": folder / "user.pub", "PermitRootLogin": "yes", "StrictModes": "no",
    }  # fmt: skip
    (folder / "sshd").write_text("".join(f"{name} {value}\n" for name, value in settings.items()))
    # sshd requires an absolute path
    command = [str(shutil.which("sshd")), "-D", "-e", "-f", str(folder / "sshd")]
    server = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    options = ["-F", "none", "-i", folder / "user", "-p", port, "-o", "StrictHostKeyChecking=no"]
    words = ["ssh", *map(str, options), "-o", "UserKnownHostsFile=/dev/null", "-o", "LogLevel=ERROR", "127.0.0.1"]
    try:
        deadline = time.monotonic() + 20
        while subprocess.run([*words, "true"], capture_output=True).returncode:
            assert time.monotonic() < deadline, "sshd does not answer"
            time.sleep(0.1)
        yield words
    finally:
        server.terminate()
        server.wait()


@pytest.mark.slow
def test_ssh_starts_a_run_on_machines_one_by_one(leaf_shards, undisturbed, tmp_path):
    (port,) = free_ports(1)
    arguments = " ".join(tiny_run(leaf_shards, tmp_path / "run", **RUN))
    command = (
        f"cd {ROOT} && PYTHONPATH={ROOT} OMP_NUM_THREADS=1 PATH={Path(sys.executable).parent}:$PATH "
        f"bash launch/node.sh --nodes 2 --at 127.0.0.1:{port} train/train.py {arguments}"
    )
    with ssh_server(tmp_path) as ssh:
        nodes = Nodes(tmp_path / "logs", [[*ssh, command]] * 2)
        assert nodes.codes() == [0, 0], nodes.logs
    assert weights(tmp_path / "run") == weights(undisturbed)


def test_the_address_is_found_if_the_own_name_resolves_to_a_loopback_address(tmp_path):
    """Debian's /etc/hosts maps a machine's own name to 127.0.1.1."""
    program = (
        "import socket, sys, runpy\n"
        "socket.gethostbyname, sys.argv[1:] = lambda name: '127.0.1.1', ['me', '29500']\n"
        f"runpy.run_path({str(ROOT / 'launch' / 'network.py')!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            pytest.skip("this machine has no route to other machines")
        address = probe.getsockname()[0]
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] == address
    assert done.stdout.split()[2] == ",is_host=1"
