"""The doctor's judgement, and what one process finds."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from itertools import combinations

import pytest

from msvae.doctor import clocks, launch, network, versions
from msvae.doctor.patience import Deadline
from msvae.doctor.row import Row

from ..conftest import ROOT, documented_commands, tiny_run
from ..servers import set_credentials


def doctor(*arguments: object) -> subprocess.CompletedProcess[str]:
    return run([sys.executable, "-m", "msvae", "doctor", *map(str, arguments)])


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)


def rows_of(done: subprocess.CompletedProcess[str]) -> dict[str, tuple[str, str]]:
    """Level and text of each row, by name."""
    lines = [line for line in done.stdout.splitlines() if line.startswith(("ok ", "warning ", "fault "))]
    parts = [(line[:7].strip(), *line[9:].split(": ", 1)) for line in lines]
    # `disk: out` and `shards: train` are names, too
    return {
        f"{name} {text.split(':')[0]}" if ": " in text and name in ("disk", "shards") else name: (level, text)
        for level, name, text in parts
    }


@pytest.mark.parametrize("count", range(2, 10))
def test_every_two_machines_meet_once_and_none_is_in_two_pairs_at_a_time(count):
    seen = [pair for pairs in network.rounds(count) for pair in pairs]
    assert sorted(seen) == sorted(combinations(range(count), 2))
    for pairs in network.rounds(count):
        busy = [end for pair in pairs for end in pair]
        assert len(busy) == len(set(busy))


def links(speeds_gbit: dict[tuple[int, int], float]) -> network.Network:
    return network.Network(
        1e-5, 1e9, [network.Link(*pair, 1e-5, speed * 1e9 / 8) for pair, speed in speeds_gbit.items()]
    )


def test_a_slow_machine_and_a_slow_link_are_named():
    hosts = ["a", "b", "c", "d"]
    fast = dict.fromkeys(combinations(range(4), 2), 100.0)
    assert [row.level for row in network.judge(links(fast), hosts, 0)] == ["ok", "ok"]
    (_, one) = network.judge(links({**fast, (1, 3): 30.0}), hosts, 0)
    assert one.level == "warning"
    assert "slow: b (rank 1) - d (rank 3) 30 Gbit/s" in one.found
    assert "lead to" not in one.advice
    (_, two) = network.judge(links({**fast, (0, 1): 30.0, (2, 3): 20.0}), hosts, 0)
    assert two.found.endswith("slow: c (rank 2) - d (rank 3) 20 Gbit/s, a (rank 0) - b (rank 1) 30 Gbit/s")
    assert "lead to" not in two.advice
    (_, machine) = network.judge(links({pair: 30.0 if 2 in pair else speed for pair, speed in fast.items()}), hosts, 0)
    assert machine.level == "warning"
    assert machine.advice.startswith("all of them lead to c (rank 2)")
    (_, all_slow) = network.judge(links(dict.fromkeys(fast, 0.4)), hosts, 0)
    assert all_slow.level == "warning", "alike, and too slow for any training"


@pytest.mark.parametrize("shortest", [(0.0001, 0.0009), (0.001, 0.0)])
def test_a_clock_is_estimated_within_its_own_bound_however_lopsided_the_way(shortest):
    for ahead_s in (-3600.0, -0.5, 0.0, 2.0):
        asked, now_s = [], 1e9
        for there_s, back_s in ((0.004, 0.001), shortest, (0.3, 0.0)):
            asked.append((now_s, now_s + there_s + ahead_s, now_s + there_s + back_s))
            now_s += 1
        skew = clocks.estimate(1, asked)
        assert abs(skew.ahead_s - ahead_s) <= skew.error_s + 1e-6
        assert skew.error_s == pytest.approx(0.0005, abs=1e-6)


@pytest.mark.parametrize(
    ("ahead_s", "error_s", "level"),
    [(0.9, 0.1, "ok"), (1.2, 0.5, "ok"), (2.0, 0.1, "warning"), (-2.0, 0.1, "warning"), (-400, 0.1, "fault")],
)
def test_clocks_are_judged_by_what_is_certain(ahead_s, error_s, level):
    (row,) = clocks.judge([clocks.Skew(8, ahead_s, error_s)], ["a"] * 8 + ["b"])
    assert row.level == level
    assert "b (rank 8)" in row.found
    assert ("behind" in row.found) == (ahead_s < 0)


def test_versions_that_differ_are_named_with_their_ranks():
    same = {"python": "3.11.7", "torch": "2.13.0", "configuration": "abc"}
    assert versions.judge([same, same])[0].level == "ok"
    (row,) = versions.judge([same, same, {**same, "torch": "2.12.0"}])
    assert (row.level, row.found) == ("fault", "torch 2.13.0 on rank 0 but 2.12.0 on rank 2")


def place(**changes: object) -> dict[str, object]:
    return {
        **{"host": "a", "local_rank": 0, "launched": 2, "joined": 2, "machines": 2, "engine": "MULTI_GPU"},
        **{"backend": "nccl", "meeting_point": "10.0.0.1", "own_address": "10.0.0.1", "interfaces": ["lo", "eth0"]},
        **{"asked_interfaces": {}, **changes},
    }


@pytest.mark.parametrize(
    ("changes", "apart", "level", "text"),
    [
        ({}, "", "ok", "no interface is asked for"),
        ({"asked_interfaces": {"NCCL_SOCKET_IFNAME": "eth"}}, "", "ok", "NCCL_SOCKET_IFNAME=eth"),
        ({"asked_interfaces": {"NCCL_SOCKET_IFNAME": "^lo,docker"}}, "", "ok", "NCCL_SOCKET_IFNAME=^lo,docker"),
        ({"asked_interfaces": {"GLOO_SOCKET_IFNAME": "eth"}}, "", "fault", "whose machine has lo, eth0"),
        ({"asked_interfaces": {"GLOO_SOCKET_IFNAME": "ib0"}}, "", "fault", "whose machine has lo, eth0"),
        ({"meeting_point": "127.0.0.1", "joined": 1}, "timed out", "fault", "is that machine itself"),
        ({"own_address": "127.0.1.1"}, "", "warning", "stands for 127.0.1.1, which others cannot reach"),
        ({"own_address": "127.0.1.1", "machines": 1}, "", "ok", "no interface"),
    ],
)
def test_traps_in_the_environment_are_seen(changes, apart, level, text):
    row = launch.judge([place(**changes), place(**changes)], apart)[-1]
    assert row.name == "environment"
    assert row.level == level
    assert text in row.found


def test_no_credential_of_a_url_is_shown():
    row = Row(
        "shards", "fault", "https://me:secret@host/a?sig=secret, s3://bucket/a is missing", "see http://x?t=secret"
    )
    shown = row.without_secrets()
    assert "secret" not in str(shown)
    assert shown.found == "https://…@host/a?…, s3://bucket/a is missing"


def test_a_look_that_fails_or_never_answers_is_a_fault_and_holds_nobody_up():
    def never() -> dict[str, object]:
        time.sleep(1000)
        raise AssertionError

    def breaks() -> dict[str, object]:
        raise KeyError("abc")

    began_s, deadline = time.monotonic(), Deadline(0.5)
    assert "no answer within" in deadline.look(never)["fault"]
    assert deadline.look(breaks) == {"fault": "KeyError: 'abc'"}
    assert time.monotonic() - began_s < 100


def test_one_process_finds_nothing_wrong_where_nothing_is_and_leaves_nothing_behind(leaf_shards, tmp_path):
    alone, for_a_run, _ = documented_commands("doctor.md")
    assert for_a_run[: len(alone)] == alone
    words = [word.replace("shards/leaves", str(leaf_shards)) for word in for_a_run]
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


def test_damage_and_a_full_disk_are_told_with_exit_code_1(leaf_shards, small_disk, tmp_path):
    shards = tmp_path / "shards"
    shutil.copytree(leaf_shards, shards)
    tar = sorted((shards / "train").glob("*.tar"))[-1]
    content = bytearray(tar.read_bytes())
    # in the middle of the pixels of the first tile
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


def test_a_store_that_cannot_be_written_is_told(moto, leaf_shards, monkeypatch):
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


def test_the_command_costs_nothing_until_it_is_asked_for():
    watched = "import sys; from msvae.cli import app; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", watched], cwd=ROOT).returncode == 0
