"""Two simulated machines on one: network namespaces with a virtual cable that can be pulled. Needs root."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from .conftest import ROOT, launch_command

DEVICE = "cable"
PORT = 29511


class TwoMachines:
    """Two network namespaces whose only connection is the cable."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names
        self.addresses = ["10.91.0.1", "10.91.0.2"]

    def launch(self, machine: int, script: Path, *arguments: object, scratch: Path) -> subprocess.Popen[str]:
        """Start `accelerate launch` with one process on a machine. A run needs one such launch on each machine."""
        command = launch_command(script, *arguments, processes=2)
        options = {
            "--num_machines": 2,
            "--machine_rank": machine,
            "--main_process_ip": self.addresses[0],
            "--main_process_port": PORT,
        }
        position = command.index("--num_processes")
        command[position:position] = [str(part) for pair in options.items() for part in pair]
        scratch.mkdir(exist_ok=True)
        return subprocess.Popen(
            [*_inside(self.names[machine]), *command],
            cwd=ROOT,
            env={**os.environ, "GLOO_SOCKET_IFNAME": DEVICE, "TMPDIR": str(scratch)},
            stdout=(scratch / "stdout").open("w"),
            stderr=(scratch / "stderr").open("w"),
            text=True,
        )

    def run(self, machine: int, *command: object) -> subprocess.Popen[str]:
        """Start a command on a machine, with pipes to its standard input and output."""
        inside = [*_inside(self.names[machine]), *map(str, command)]
        return subprocess.Popen(inside, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def pull_cable(self) -> None:
        """Disconnect the machines: packets are lost without an error on either side."""
        _run(*_inside(self.names[0]), "ip", "link", "set", DEVICE, "down")

    def slow_down(self, rate_mbit: float) -> None:
        """Limit the rate at which each machine sends."""
        for name in self.names:
            shape = ("tbf", "rate", f"{rate_mbit}mbit", "burst", "8192", "limit", str(2**26))
            _run(*_inside(name), "tc", "qdisc", "replace", "dev", DEVICE, "root", *shape)

    def plug_in(self) -> None:
        """Connect the machines again."""
        _run(*_inside(self.names[0]), "ip", "link", "set", DEVICE, "up")


@contextmanager
def two_machines() -> Iterator[TwoMachines]:
    """Yield two machines. Skip the test if network namespaces cannot be created."""
    names = [f"msvae-{os.getpid()}-{machine}" for machine in range(2)]
    if os.geteuid() or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and iproute2")
    created = []
    try:
        for name in names:
            if subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode:
                pytest.skip("network namespaces cannot be created here")
            created.append(name)
        machines = TwoMachines(names)
        _run("ip", "link", "add", DEVICE, "netns", names[0], "type", "veth", "peer", "name", DEVICE, "netns", names[1])
        for name, address in zip(names, machines.addresses, strict=True):
            _run(*_inside(name), "ip", "address", "add", f"{address}/24", "dev", DEVICE)
            for device in ("lo", DEVICE):
                _run(*_inside(name), "ip", "link", "set", device, "up")
        yield machines
    finally:
        for name in created:
            _run("ip", "netns", "delete", name)


def _inside(name: str) -> list[str]:
    return ["ip", "netns", "exec", name]


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)
