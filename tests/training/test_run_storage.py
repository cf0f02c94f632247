"""A run's folder and its copy in an object store (moto), and the lock of a URL."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
import torch

from msvae.shards.stores.remote import RetryPolicy, WritableStore
from msvae.training import checkpoints
from msvae.training import lock as lock_module
from msvae.training.lock import StoreLock
from msvae.training.run_storage import Mirror, Uploads

from ..servers import BUCKET, s3_server, set_credentials

SHORT = RetryPolicy(attempts=2, first_wait_s=0.01, timeout_s=2)


class Machine:
    """A disk beside a URL."""

    def __init__(self, url: str, folder: Path) -> None:
        self.folder, self.url = folder, url
        self.lock = StoreLock(url)
        self.mirror = Mirror(WritableStore(url, SHORT), folder, self.lock)
        self.damages = self.mirror.download()

    def save(self, step: int, keep: int = 2, score: float | None = None) -> None:
        checkpoints.write(self.folder, step, {"w": torch.full((500,), float(step))}, {"score": score}, keep)

    def away(self) -> None:
        self.lock.release()


@pytest.fixture
def url(moto, monkeypatch, request) -> str:
    set_credentials(monkeypatch, f"http://{moto[0]}:{moto[1]}")
    return f"s3://{BUCKET}/runs/{request.node.name}"


@pytest.fixture
def machines(url, tmp_path) -> Iterator[list[Machine]]:
    """Call `start` for one after the other: each has an empty disk."""
    started: list[Machine] = []
    yield started
    for machine in started:
        machine.away()


def start(machines: list[Machine], url: str, tmp_path: Path) -> Machine:
    for machine in machines:
        machine.away()
    machines.append(Machine(url, tmp_path / f"machine-{len(machines)}"))
    return machines[-1]


def objects(url: str) -> dict[str, int]:
    return WritableStore(url, SHORT).sizes_bytes()


def steps(url: str) -> list[str]:
    return sorted({name.split("/")[1] for name in objects(url) if name.startswith("checkpoints/step-")})


def test_a_new_machine_goes_on_with_the_newest_checkpoint_and_the_logs(machines, url, tmp_path):
    first = start(machines, url, tmp_path)
    assert first.damages == []
    (first.folder / "best").mkdir()
    (first.folder / "best" / "config.json").write_text("{}")
    (first.folder / ".hidden.partial").write_text("half")
    (first.folder / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"st')
    for step in (3, 6):
        first.save(step)
        first.mirror.upload()
    second = start(machines, url, tmp_path)
    assert checkpoints.newest_valid(second.folder) == (second.folder / "checkpoints" / "step-00000006", [])
    assert (second.folder / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'
    assert WritableStore(url, SHORT).read("checkpoints/latest") == b"step-00000006\n"
    assert "best/config.json" in objects(url)
    assert not any("hidden" in name for name in objects(url))
    assert not (second.folder / "checkpoints" / "step-00000003" / "tensors.safetensors").exists(), "read for nothing"


def test_retention_in_the_store_is_that_of_a_folder_across_machines(machines, url, tmp_path):
    first = start(machines, url, tmp_path)
    for step, score in ((3, 0.5), (6, 0.1), (9, 0.4)):
        first.save(step, score=score)
        first.mirror.upload()
    assert steps(url) == ["step-00000006", "step-00000009"]
    second = start(machines, url, tmp_path)
    for step, score in ((12, 0.3), (15, 0.2)):
        second.save(step, score=score)
        second.mirror.upload()
    assert steps(url) == ["step-00000006", "step-00000012", "step-00000015"], "the best and the newest two"
    third = start(machines, url, tmp_path)
    third.save(18, score=0.01)
    third.mirror.upload()
    assert steps(url) == ["step-00000015", "step-00000018"]


@pytest.mark.parametrize("torn", ["checksums.json", "state.json", "content"])
def test_a_torn_upload_is_named_and_the_checkpoint_before_it_is_taken(machines, url, tmp_path, torn):
    first = start(machines, url, tmp_path)
    for step in (3, 6):
        first.save(step)
        first.mirror.upload()
    store = WritableStore(url, SHORT)
    newest = "checkpoints/step-00000006"
    if torn == "content":
        store.put(f"{newest}/tensors.safetensors", store.read("checkpoints/step-00000003/tensors.safetensors"))
    else:
        store.delete([f"{newest}/{torn}"])
    second = start(machines, url, tmp_path)
    assert checkpoints.newest_valid(second.folder) == (second.folder / "checkpoints" / "step-00000003", [])
    assert len(second.damages) == 1
    assert f"{url}/{newest}" in second.damages[0]
    second.save(6)
    second.mirror.upload()
    third = start(machines, url, tmp_path)
    assert third.damages == []
    assert checkpoints.newest_valid(third.folder)[0] == third.folder / newest


def test_a_first_checkpoint_torn_in_its_upload_lets_a_run_begin_anew(machines, url, tmp_path):
    WritableStore(url, SHORT).put("checkpoints/step-00000003/tensors.safetensors", b"half")
    machine = start(machines, url, tmp_path)
    assert checkpoints.newest_valid(machine.folder) == (None, [])
    assert "its upload did not end" in machine.damages[0]


def test_the_last_uploaded_checkpoint_stays_until_a_newer_one_is_there(machines, url, tmp_path):
    """The folder may be steps ahead of a slow store."""
    machine = start(machines, url, tmp_path)
    machine.save(3, keep=1)
    machine.mirror.upload()
    machine.save(6, keep=1)
    tensors = machine.folder / "checkpoints" / "step-00000006" / "tensors.safetensors"
    tensors.rename(tmp_path / "dropped on the way")
    machine.mirror.upload()
    assert steps(url) == ["step-00000003"]
    (tmp_path / "dropped on the way").rename(tensors)
    machine.mirror.upload()
    assert steps(url) == ["step-00000006"]


def test_other_machines_add_their_records_and_touch_nothing_else(machines, url, tmp_path):
    main = start(machines, url, tmp_path)
    main.save(3)
    (main.folder / "trace").mkdir()
    (main.folder / "trace" / "rank-00000.jsonl").write_text('{"step": 1}\n')
    main.mirror.upload()
    other = Mirror(WritableStore(url, SHORT), tmp_path / "other", None)
    assert other.download() == []
    assert not (tmp_path / "other" / "checkpoints").exists()
    (tmp_path / "other" / "trace" / "rank-00001.jsonl").write_text('{"step": 7}\n')
    (tmp_path / "other" / "metrics.jsonl").write_text('{"step": 7}\n')
    other.upload()
    assert {name for name in objects(url) if "jsonl" in name} == {"trace/rank-00000.jsonl", "trace/rank-00001.jsonl"}


def test_a_store_that_goes_away_is_an_error_that_names_the_url(monkeypatch, tmp_path):
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr(lock_module, "UPLOADS", SHORT)
    url = f"s3://{BUCKET}/runs/lost"
    with s3_server(tmp_path / "empty", "nothing") as (host, port):
        set_credentials(monkeypatch, f"http://{host}:{port}")
        machine = Machine(url, tmp_path / "machine")
    with pytest.raises(ValueError, match=rf"{url}/.* could not be written in 2 attempts .*; check the network"):
        machine.mirror.upload()
    machine.away()


def test_an_upload_that_hangs_delays_nobody_and_only_one_waits_behind_it():
    begun, go_on, num_pushes = threading.Event(), threading.Event(), []

    def push() -> None:
        num_pushes.append(1)
        begun.set()
        go_on.wait()

    uploads = Uploads(push)
    uploads.start()
    begun.wait()
    for _ in range(5):
        uploads.start()
    assert len(num_pushes) == 1
    go_on.set()
    uploads.finish()
    assert len(num_pushes) == 3, "the one that hung, the one that waited, the last"
    uploads.close()


def test_a_failed_upload_fails_what_follows():
    def push() -> None:
        raise ValueError("s3://leaves could not be written")

    uploads = Uploads(push)
    uploads.start()
    with pytest.raises(ValueError, match="s3://leaves"):
        uploads.finish()
    with pytest.raises(ValueError, match="s3://leaves"):
        uploads.start()
    uploads.close()


def test_a_url_is_refused_while_its_holder_lives_and_taken_over_when_not(url, monkeypatch):
    monkeypatch.setattr(lock_module, "ABANDONED_S", 3.0)
    monkeypatch.setattr(lock_module, "POLL_S", 0.1)
    monkeypatch.setattr(lock_module, "RENEW_S", 0.3)
    living = StoreLock(url)
    with pytest.raises(ValueError, match=rf"{url} is being written by process \d+ on \S+; wait for it, or choose"):
        StoreLock(url)
    living.release()
    assert "run.lock" not in objects(url)

    monkeypatch.setattr(lock_module, "RENEW_S", 1e6)
    left_behind = StoreLock(url)
    monkeypatch.setattr(lock_module, "ABANDONED_S", 0.5)
    heir = StoreLock(url)
    with pytest.raises(ValueError, match=r"run.lock no longer belongs to this run but to process"):
        left_behind.renew()
    left_behind.release()
    heir.renew()
    heir.release()


def test_of_many_that_find_an_abandoned_url_one_gets_it(url, monkeypatch):
    monkeypatch.setattr(lock_module, "ABANDONED_S", 1.0)
    monkeypatch.setattr(lock_module, "POLL_S", 0.1)
    WritableStore(url, SHORT).put("run.lock", b"process 1 on a machine that is gone 0 0")
    monkeypatch.setattr(lock_module, "RENEW_S", 0.2)
    held: list[StoreLock] = []
    refused: list[str] = []

    def take() -> None:
        try:
            held.append(StoreLock(url))
        except ValueError as error:
            refused.append(str(error))

    rivals = [threading.Thread(target=take) for _ in range(4)]
    for rival in rivals:
        rival.start()
    for rival in rivals:
        rival.join()
    assert len(held) == 1
    assert len(refused) == 3
    held[0].release()


@pytest.mark.parametrize("place", ["ftp://host/run", "https://host/run", "file:///run"])
def test_a_url_that_cannot_be_written_says_which_can(place):
    with pytest.raises(ValueError, match=rf"{place} cannot be written to; give a folder, s3://, gs:// or az://"):
        StoreLock(place)


def test_a_bucket_that_is_not_there_is_named(url):
    with pytest.raises(
        ValueError, match=r"s3://no-such-bucket/run/run.lock cannot be written: there is no such bucket"
    ):
        StoreLock("s3://no-such-bucket/run")


def test_what_is_uploaded_is_what_lies_in_the_folder(machines, url, tmp_path):
    machine = start(machines, url, tmp_path)
    machine.save(3)
    (machine.folder / "best").mkdir()
    (machine.folder / "best" / "config.json").write_text(json.dumps({"a": 1}))
    big = machine.folder / "best" / "weights.safetensors"
    big.write_bytes(bytes(range(256)) * 50_000)  # more than one part
    machine.mirror.upload()
    client = boto3.client("s3")
    prefix = url.removeprefix(f"s3://{BUCKET}/")
    for path in (path for path in machine.folder.rglob("*") if path.is_file()):
        key = f"{prefix}/{path.relative_to(machine.folder)}"
        assert client.get_object(Bucket=BUCKET, Key=key)["Body"].read() == path.read_bytes()
