"""`msvae doctor` on several ranks and machines, healthy and with real faults."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import pytest

from ..conftest import ROOT, documented_commands, launch_command, tiny_run
from ..namespaces import two_machines

FAKETIME = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1")


def doctor_command(arguments: Sequence[object], *options: object, processes: int = 2) -> list[str]:
    """Return `accelerate launch … --module msvae doctor …`, as a user writes it."""
    command = launch_command("msvae", "doctor", *arguments, processes=processes)
    at = command.index("msvae")
    command[at:at] = [*map(str, options), "--module"]
    return command


def found_in(text: str, level: str) -> dict[str, str]:
    """Return the rows of a level by their names, up to the first colon."""
    lines = [line[9:] for line in text.splitlines() if line.startswith(f"{level} ")]
    return {line.split(":")[0]: line for line in lines}


def run(
    commands: Sequence[Sequence[str]], folders: Sequence[Path], environments: Sequence[dict[str, str]]
) -> list[str]:
    """Return the exit code, which is equal for all, and then the output of each machine."""
    running = [
        subprocess.Popen(
            command, cwd=cwd, env={**os.environ, **own}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for command, cwd, own in zip(commands, folders, environments, strict=True)
    ]
    try:
        ended = [process.communicate(timeout=200) for process in running]
    finally:
        for process in running:
            # the launcher forwards the signal to its ranks
            process.terminate()
    codes = {process.returncode for process in running}
    assert len(codes) == 1, ended
    return [str(codes.pop()), *(out for out, _ in ended)]


def on_two_machines(arguments: Sequence[object]) -> list[list[str]]:
    """Return the commands of two machines, both of which are this machine."""
    port = free_port()
    return [
        doctor_command(
            arguments,
            *("--num_machines", 2, "--machine_rank", machine),
            *("--main_process_ip", "127.0.0.1", "--main_process_port", port),
        )
        for machine in range(2)
    ]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_two_healthy_ranks_have_no_fault_and_one_of_them_prints(leaf_shards, tmp_path):
    *_, command = documented_commands("doctor.md")
    words = [word.replace("shards/leaves", str(leaf_shards)) for word in command]
    code, out = run([[*words, "--out", str(tmp_path / "run")]], [ROOT], [{}])
    assert code == "0", out
    assert found_in(out, "fault") == {}
    fine = found_in(out, "ok")
    assert fine["ranks"] == "ranks: 2 launched, 2 joined, on 1 machine"
    assert "MULTI_CPU, backend gloo" in fine["engine"]
    assert "equal on all ranks" in fine["versions"]
    assert "a gradient of" in fine["collectives"]
    assert "1 micro batch of 2 on each of 2 ranks" in fine["batch"]
    assert ("links" in fine) != ("links" in found_in(out, "warning"))
    assert out.count("ranks: 2 launched") == 1, "only one rank prints"
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_damaged_shard_and_another_version_on_one_machine_are_named_with_its_rank(leaf_shards, tmp_path):
    disks = [tmp_path / "first", tmp_path / "second"]
    for disk in disks:
        shutil.copytree(leaf_shards, disk / "shards")
    tar = sorted((disks[1] / "shards" / "train").glob("*.tar"))[0]
    tar.write_bytes(tar.read_bytes()[:-2048])
    site = disks[1] / "site"
    (site / "diffusers-0.1.0.dist-info").mkdir(parents=True)
    (site / "diffusers-0.1.0.dist-info" / "METADATA").write_text("Name: diffusers\nVersion: 0.1.0\n")
    paths = [str(site), *filter(None, [os.environ.get("PYTHONPATH")])]
    commands = on_two_machines(tiny_run(Path("shards"), tmp_path / "run"))
    code, out, second = run(commands, disks, [{}, {"PYTHONPATH": os.pathsep.join(paths)}])
    assert code == "1"
    faults = found_in(out, "fault")
    assert faults.keys() == {"versions", "shards"}
    assert f"diffusers {version('diffusers')} on rank 0 but 0.1.0 on rank 1" in faults["versions"]
    assert f"on rank 1: shard shards/train/{tar.name}" in faults["shards"]
    assert "it was truncated or replaced" in faults["shards"]
    assert "2 launched, 2 joined, on 2 machines" in out
    assert "clocks" in found_in(out, "ok")
    assert "launched" not in second, "only the first machine prints"


def test_a_launcher_that_starts_one_of_several_processes_is_a_fault_with_an_explanation(tmp_path):
    config = tmp_path / "multi_cpu.yaml"
    config.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_CPU\nnum_processes: 2\nuse_cpu: true\n"
    )
    command = doctor_command([])
    command[command.index("--config_file") + 1] = str(config)
    code, out = run([command], [ROOT], [{}])
    assert code == "1"
    faults = found_in(out, "fault")
    assert faults.keys() == {"ranks"}
    assert "accelerate was asked for several processes and started one" in faults["ranks"]
    assert "versions" in found_in(out, "ok"), "other checks run nevertheless"


def ranks(count: int) -> list[dict[str, str]]:
    """Return the environment that srun or mpirun sets for ranks of two machines."""
    shared = {"WORLD_SIZE": "2", "GROUP_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": "0"} for rank in range(count)]


@pytest.mark.slow
@pytest.mark.skipif(not FAKETIME.exists(), reason="libfaketime is not installed")
def test_a_clock_that_is_ahead_is_reported_with_the_error_bound():
    # not more, because code that waits until a clock time waits that much longer
    ahead = {"LD_PRELOAD": str(FAKETIME), "FAKETIME": "+3s", "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
    first, second = ranks(2)
    command = [sys.executable, "-m", "msvae", "doctor"]
    code, out, _ = run([command, command], [ROOT, ROOT], [first, second | ahead])
    assert code == "0"
    row = found_in(out, "warning")["clocks"]
    assert "(rank 1) is 3.0 s ahead of rank 0 (± " in row
    assert "NTP" in row


@pytest.mark.slow
def test_a_machine_that_never_joins_is_a_fault_after_the_timeout():
    code, out = run([[sys.executable, "-m", "msvae", "doctor", "--timeout-s", "5"]], [ROOT], ranks(1))
    assert code == "1"
    faults = found_in(out, "fault")
    assert "2 launched, 1 joined, on 2 machines" in faults["ranks"]
    assert "which each machine resolves to itself" in faults["environment"]


@pytest.mark.slow
@pytest.mark.parametrize("failure", ["os._exit(1)", "time.sleep(1000)"])
def test_a_rank_that_dies_or_hangs_after_joining_is_a_fault_and_does_not_block_others(failure):
    second = f"import os, time; from msvae.distributed.setup import join_ranks; join_ranks(60); {failure}"
    commands = [[sys.executable, "-m", "msvae", "doctor", "--timeout-s", "5"], [sys.executable, "-c", second]]
    running = [
        subprocess.Popen(command, cwd=ROOT, env={**os.environ, **own}, stdout=subprocess.PIPE, text=True)
        for command, own in zip(commands, ranks(2), strict=True)
    ]
    try:
        out, _ = running[0].communicate(timeout=200)
    finally:
        for process in running:
            process.kill()
            process.wait()
    assert running[0].returncode == 1
    assert "2 joined, on 2 machines: then one rank was lost or stopped responding" in found_in(out, "fault")["ranks"]
    assert "versions" in found_in(out, "ok")


@pytest.mark.slow
def test_a_slow_cable_between_two_machines_is_named():
    with two_machines() as machines:
        machines.slow_down(50)
        running = []
        for machine in range(2):
            command = doctor_command(
                [],
                *("--num_machines", 2, "--machine_rank", machine),
                *("--main_process_ip", machines.addresses[0], "--main_process_port", 29512),
            )
            running.append(machines.run(machine, "env", "GLOO_SOCKET_IFNAME=cable", *command))
        out, _ = running[0].communicate(timeout=200)
        assert [process.wait(100) for process in running] == [0, 0], "a slow cable is only a warning"
    row = found_in(out, "warning")["links"]
    named = row.split("slow: ")[1]
    assert "(rank 0)" in named
    assert "(rank 1)" in named
    speed_gbit = float(named.split(" Gbit/s")[0].rsplit(" ", 1)[1])
    assert 0.03 < speed_gbit < 0.055
