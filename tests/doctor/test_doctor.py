"""The checks of `msvae doctor`, and the command in a single process."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from itertools import combinations

import pytest

from msvae.doctor import launch, network
from msvae.doctor.row import Deadline, Row

from ..conftest import ROOT, documented_commands, tiny_run
from ..servers import set_credentials


def doctor(*arguments: object) -> subprocess.CompletedProcess[str]:
    return run([sys.executable, "-m", "msvae", "doctor", *map(str, arguments)])


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)


def rows_of(done: subprocess.CompletedProcess[str]) -> dict[str, tuple[str, str]]:
    """Return level and text of each row, by name."""
    lines = [line for line in done.stdout.splitlines() if line.startswith(("ok ", "warning ", "fault "))]
    parts = [(line[:7].strip(), *line[9:].split(": ", 1)) for line in lines]
    # `disk: out` and `shards: train` are names with a colon
    return {
        f"{name} {text.split(':')[0]}" if ": " in text and name in ("disk", "shards") else name: (level, text)
        for level, name, text in parts
    }


@pytest.mark.parametrize("count", range(2, 10))
def test_each_two_machines_are_paired_once_and_no_machine_is_in_two_pairs_of_a_round(count):
    seen = [pair for pairs in network.pair_rounds(count) for pair in pairs]
    assert sorted(seen) == sorted(combinations(range(count), 2))
    for pairs in network.pair_rounds(count):
        busy = [end for pair in pairs for end in pair]
        assert len(busy) == len(set(busy))


def links(speeds_gbit: dict[tuple[int, int], float]) -> network.Network:
    return network.Network(
        1e-5, 1e9, [network.Link(*pair, 1e-5, speed * 1e9 / 8) for pair, speed in speeds_gbit.items()]
    )


def test_a_slow_machine_and_slow_links_are_named():
    hosts = ["a", "b", "c", "d"]
    fast = dict.fromkeys(combinations(range(4), 2), 100.0)
    assert [row.level for row in network.check_network(links(fast), hosts, 0)] == ["ok", "ok"]
    (_, one) = network.check_network(links({**fast, (1, 3): 30.0}), hosts, 0)
    assert one.level == "warning"
    assert "slow: b (rank 1) - d (rank 3) 30 Gbit/s" in one.found
    assert "end at" not in one.advice
    (_, two) = network.check_network(links({**fast, (0, 1): 30.0, (2, 3): 20.0}), hosts, 0)
    assert two.found.endswith("slow: c (rank 2) - d (rank 3) 20 Gbit/s, a (rank 0) - b (rank 1) 30 Gbit/s")
    assert "end at" not in two.advice
    (_, machine) = network.check_network(
        links({pair: 30.0 if 2 in pair else speed for pair, speed in fast.items()}), hosts, 0
    )
    assert machine.level == "warning"
    assert machine.advice.startswith("all slow links end at c (rank 2)")
    (_, all_slow) = network.check_network(links(dict.fromkeys(fast, 0.4)), hosts, 0)
    assert all_slow.level == "warning", "equal, and too slow for any training"


@pytest.mark.parametrize("shortest", [(0.0001, 0.0009), (0.001, 0.0)])
def test_a_clock_estimate_is_within_its_error_bound_for_any_asymmetric_delay(shortest):
    for ahead_s in (-3600.0, -0.5, 0.0, 2.0):
        exchanges, now_s = [], 1e9
        for there_s, back_s in ((0.004, 0.001), shortest, (0.3, 0.0)):
            exchanges.append((now_s, now_s + there_s + ahead_s, now_s + there_s + back_s))
            now_s += 1
        skew = network.estimate_skew(1, exchanges)
        assert abs(skew.ahead_s - ahead_s) <= skew.error_s + 1e-6
        assert skew.error_s == pytest.approx(0.0005, abs=1e-6)


@pytest.mark.parametrize(
    ("ahead_s", "error_s", "level"),
    [(0.9, 0.1, "ok"), (1.2, 0.5, "ok"), (2.0, 0.1, "warning"), (-2.0, 0.1, "warning"), (-400, 0.1, "fault")],
)
def test_only_a_certain_clock_difference_is_a_warning_or_fault(ahead_s, error_s, level):
    (row,) = network.check_clocks([network.Skew(8, ahead_s, error_s)], ["a"] * 8 + ["b"])
    assert row.level == level
    assert "b (rank 8)" in row.found
    assert ("behind" in row.found) == (ahead_s < 0)


def test_different_versions_are_named_with_their_ranks():
    same = {"python": "3.11.7", "torch": "2.13.0", "configuration": "abc"}
    assert launch.check_versions([same, same])[0].level == "ok"
    (row,) = launch.check_versions([same, same, {**same, "torch": "2.12.0"}])
    assert (row.level, row.found) == ("fault", "torch 2.13.0 on rank 0 but 2.12.0 on rank 2")


def launch_facts(**changes: object) -> dict[str, object]:
    return {
        **{"host": "a", "local_rank": 0, "launched": 2, "joined": 2, "machines": 2, "engine": "MULTI_GPU"},
        **{
            "backend": "nccl",
            "rendezvous_address": "10.0.0.1",
            "own_address": "10.0.0.1",
            "interfaces": ["lo", "eth0"],
        },
        **{"interface_settings": {}, **changes},
    }


@pytest.mark.parametrize(
    ("changes", "not_joined", "level", "text"),
    [
        ({}, "", "ok", "no network interface is set"),
        ({"interface_settings": {"NCCL_SOCKET_IFNAME": "eth"}}, "", "ok", "NCCL_SOCKET_IFNAME=eth"),
        ({"interface_settings": {"NCCL_SOCKET_IFNAME": "^lo,docker"}}, "", "ok", "NCCL_SOCKET_IFNAME=^lo,docker"),
        (
            {"interface_settings": {"GLOO_SOCKET_IFNAME": "eth"}},
            "",
            "fault",
            "matches no interface of that machine, which has lo, eth0",
        ),
        (
            {"interface_settings": {"GLOO_SOCKET_IFNAME": "ib0"}},
            "",
            "fault",
            "matches no interface of that machine, which has lo, eth0",
        ),
        (
            {"rendezvous_address": "127.0.0.1", "joined": 1},
            "timed out",
            "fault",
            "which each machine resolves to itself",
        ),
        ({"own_address": "127.0.1.1"}, "", "warning", "resolves to 127.0.1.1, which other machines cannot reach"),
        ({"own_address": "127.0.1.1", "machines": 1}, "", "ok", "no network interface is set"),
    ],
)
def test_wrong_network_settings_are_found(changes, not_joined, level, text):
    row = launch.check_launch([launch_facts(**changes), launch_facts(**changes)], not_joined)[-1]
    assert row.name == "environment"
    assert row.level == level
    assert text in row.found


def test_credentials_in_urls_are_not_shown():
    row = Row(
        "shards", "fault", "https://me:secret@host/a?sig=secret, s3://bucket/a is missing", "see http://x?t=secret"
    )
    shown = row.without_secrets()
    assert "secret" not in str(shown)
    assert shown.found == "https://…@host/a?…, s3://bucket/a is missing"


def test_a_check_that_fails_or_hangs_is_a_fault_and_does_not_delay_other_checks():
    def hangs() -> dict[str, object]:
        time.sleep(1000)
        raise AssertionError

    def fails() -> dict[str, object]:
        raise KeyError("abc")

    began_s, deadline = time.monotonic(), Deadline(0.5)
    assert "no answer within" in deadline.run(hangs)["fault"]
    assert deadline.run(fails) == {"fault": "KeyError: 'abc'"}
    assert time.monotonic() - began_s < 100


def test_a_healthy_machine_has_no_fault_and_no_file_is_left_behind(leaf_shards, tmp_path):
    bare, with_config, _ = documented_commands("doctor.md")
    assert with_config[: len(bare)] == bare
    words = [word.replace("shards/leaves", str(leaf_shards)) for word in with_config]
    done = run([*words, "--out", str(tmp_path / "run")])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 faults" in done.stdout
    rows = rows_of(done)
    assert {level for level, _ in rows.values()} <= {"ok", "warning"}
    assert rows.keys() >= {
        *("ranks", "engine", "device", "precision", "cores", "shared memory", "open files", "versions", "model"),
        *("disk out", "disk TMPDIR", "batch", "shards train", "shards val"),
    }
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_shard_and_a_full_disk_are_faults_with_exit_code_1(leaf_shards, small_disk, tmp_path):
    shards = tmp_path / "shards"
    shutil.copytree(leaf_shards, shards)
    tar = sorted((shards / "train").glob("*.tar"))[-1]
    content = bytearray(tar.read_bytes())
    # this byte is in the pixels of the first tile
    content[2000] ^= 1
    tar.write_bytes(content)
    done = doctor(*tiny_run(shards, small_disk / "run", data__global_batch_size=7))
    assert done.returncode == 1, done.stdout + done.stderr
    rows = rows_of(done)
    faults = {name: text for name, (level, text) in rows.items() if level == "fault"}
    assert faults.keys() == {"disk out", "batch", "shards train"}
    assert str(tar) in faults["shards train"]
    assert "truncated or altered" in faults["shards train"]
    assert "too little" in faults["disk out"]
    assert rows["shards val"][0] == "ok"
    assert "3 faults" in done.stdout
    assert list(small_disk.iterdir()) == []


def test_a_store_that_cannot_be_written_is_a_fault(moto, leaf_shards, monkeypatch):
    set_credentials(monkeypatch, f"http://{moto[0]}:{moto[1]}")
    arguments = {"data__train": "s3://leaves/field/shards/train", "data__val": "s3://leaves/field/shards/val"}
    done = doctor(*tiny_run(leaf_shards, "s3://no-such-bucket/run", **arguments))
    assert done.returncode == 1, done.stdout + done.stderr
    rows = rows_of(done)
    (fault,) = [text for level, text in rows.values() if level == "fault"]
    assert "s3://no-such-bucket/run/doctor-" in fault
    assert "there is no such bucket" in fault
    assert rows["shards train"][0] == rows["shards val"][0] == "ok"


def test_a_mistake_in_the_command_is_one_line_and_exit_code_2():
    done = doctor("--data.tain", "x")
    assert done.returncode == 2
    assert done.stderr.strip() == "error: command line: key data.tain is unknown; did you mean data.train?"


def test_other_commands_do_not_import_torch():
    watched = "import sys; from msvae.cli import app; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", watched], cwd=ROOT).returncode == 0
