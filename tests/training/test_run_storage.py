"""The folder of a run and its copy in an object store (moto), and the locks of folders and URLs."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
import torch

from msvae.shards.stores.remote import RetryPolicy, WritableStore
from msvae.training import checkpoints
from msvae.training import lock as lock_module
from msvae.training.lock import FolderLock, StoreLock
from msvae.training.run_storage import Mirror, Uploads

from ..servers import BUCKET, s3_server, set_credentials

SHORT = RetryPolicy(attempts=2, first_wait_s=0.01, timeout_s=2)


class Machine:
    """A machine with its own disk that writes a run to a URL."""

    def __init__(self, url: str, folder: Path) -> None:
        self.folder, self.url = folder, url
        self.lock = StoreLock(url)
        self.mirror = Mirror(WritableStore(url, SHORT), folder, self.lock)
        self.damages = self.mirror.download()

    def save(self, step: int, keep: int = 2, score: float | None = None) -> None:
        checkpoints.write(self.folder, step, {"w": torch.full((500,), float(step))}, {"score": score}, keep)

    def release(self) -> None:
        self.lock.release()


@pytest.fixture
def url(moto, monkeypatch, request) -> str:
    set_credentials(monkeypatch, f"http://{moto[0]}:{moto[1]}")
    return f"s3://{BUCKET}/runs/{request.node.name}"


@pytest.fixture
def machines(url, tmp_path) -> Iterator[list[Machine]]:
    """Return a list for `start`, which adds a machine with an empty disk, and release its locks at the end."""
    started: list[Machine] = []
    yield started
    for machine in started:
        machine.release()


def start(machines: list[Machine], url: str, tmp_path: Path) -> Machine:
    for machine in machines:
        machine.release()
    machines.append(Machine(url, tmp_path / f"machine-{len(machines)}"))
    return machines[-1]


def objects(url: str) -> dict[str, int]:
    return WritableStore(url, SHORT).sizes_bytes()


def steps(url: str) -> list[str]:
    return sorted({name.split("/")[1] for name in objects(url) if name.startswith("checkpoints/step-")})


def test_a_new_machine_downloads_the_newest_checkpoint_and_the_logs(machines, url, tmp_path):
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
    assert not (second.folder / "checkpoints" / "step-00000003" / "tensors.safetensors").exists(), (
        "not needed, so it is not downloaded"
    )


def test_the_store_keeps_the_same_checkpoints_as_a_folder_across_machines(machines, url, tmp_path):
    first = start(machines, url, tmp_path)
    for step, score in ((3, 0.5), (6, 0.1), (9, 0.4)):
        first.save(step, score=score)
        first.mirror.upload()
    assert steps(url) == ["step-00000006", "step-00000009"]
    second = start(machines, url, tmp_path)
    for step, score in ((12, 0.3), (15, 0.2)):
        second.save(step, score=score)
        second.mirror.upload()
    assert steps(url) == ["step-00000006", "step-00000012", "step-00000015"], "the best and the two newest"
    third = start(machines, url, tmp_path)
    third.save(18, score=0.01)
    third.mirror.upload()
    assert steps(url) == ["step-00000015", "step-00000018"]


@pytest.mark.parametrize("damage", ["checksums.json", "state.json", "content"])
def test_an_interrupted_upload_is_reported_and_the_checkpoint_before_it_is_used(machines, url, tmp_path, damage):
    first = start(machines, url, tmp_path)
    for step in (3, 6):
        first.save(step)
        first.mirror.upload()
    store = WritableStore(url, SHORT)
    newest = "checkpoints/step-00000006"
    if damage == "content":
        store.put(f"{newest}/tensors.safetensors", store.read("checkpoints/step-00000003/tensors.safetensors"))
    else:
        store.delete([f"{newest}/{damage}"])
    second = start(machines, url, tmp_path)
    assert checkpoints.newest_valid(second.folder) == (second.folder / "checkpoints" / "step-00000003", [])
    assert len(second.damages) == 1
    assert f"{url}/{newest}" in second.damages[0]
    second.save(6)
    second.mirror.upload()
    third = start(machines, url, tmp_path)
    assert third.damages == []
    assert checkpoints.newest_valid(third.folder)[0] == third.folder / newest


def test_a_run_starts_from_the_beginning_if_its_first_upload_was_interrupted(machines, url, tmp_path):
    WritableStore(url, SHORT).put("checkpoints/step-00000003/tensors.safetensors", b"half")
    machine = start(machines, url, tmp_path)
    assert checkpoints.newest_valid(machine.folder) == (None, [])
    assert "its upload was not finished" in machine.damages[0]


def test_the_last_uploaded_checkpoint_stays_until_a_newer_one_is_uploaded(machines, url, tmp_path):
    """The folder may hold newer checkpoints than a slow store."""
    machine = start(machines, url, tmp_path)
    machine.save(3, keep=1)
    machine.mirror.upload()
    machine.save(6, keep=1)
    tensors = machine.folder / "checkpoints" / "step-00000006" / "tensors.safetensors"
    tensors.rename(tmp_path / "removed meanwhile")
    machine.mirror.upload()
    assert steps(url) == ["step-00000003"]
    (tmp_path / "removed meanwhile").rename(tensors)
    machine.mirror.upload()
    assert steps(url) == ["step-00000006"]


def test_other_machines_upload_their_records_and_nothing_else(machines, url, tmp_path):
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


def test_an_unreachable_store_is_an_error_that_names_the_url(monkeypatch, tmp_path):
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr(lock_module, "UPLOADS", SHORT)
    url = f"s3://{BUCKET}/runs/lost"
    with s3_server(tmp_path / "empty", "nothing") as (host, port):
        set_credentials(monkeypatch, f"http://{host}:{port}")
        machine = Machine(url, tmp_path / "machine")
    with pytest.raises(ValueError, match=rf"{url}/.* could not be written in 2 attempts .*; check the network"):
        machine.mirror.upload()
    machine.release()


def test_a_slow_upload_blocks_no_step_and_at_most_one_upload_waits_for_it():
    started, go_on, num_uploads = threading.Event(), threading.Event(), []

    def upload() -> None:
        num_uploads.append(1)
        started.set()
        go_on.wait()

    uploads = Uploads(upload)
    uploads.start()
    started.wait()
    for _ in range(5):
        uploads.start()
    assert len(num_uploads) == 1
    go_on.set()
    uploads.finish()
    assert len(num_uploads) == 3, "the slow one, the one that waited, the last one"
    uploads.close()


def test_after_a_failed_upload_all_later_calls_fail():
    def upload() -> None:
        raise ValueError("s3://leaves could not be written")

    uploads = Uploads(upload)
    uploads.start()
    with pytest.raises(ValueError, match="s3://leaves"):
        uploads.finish()
    with pytest.raises(ValueError, match="s3://leaves"):
        uploads.start()
    uploads.close()


def test_a_lock_is_refused_while_its_holder_runs_and_taken_over_when_it_is_abandoned(url, monkeypatch):
    monkeypatch.setattr(lock_module, "ABANDONED_S", 3.0)
    monkeypatch.setattr(lock_module, "POLL_S", 0.1)
    monkeypatch.setattr(lock_module, "RENEW_S", 0.3)
    held = StoreLock(url)
    with pytest.raises(ValueError, match=rf"{url} is in use by process \d+ on \S+; wait until it ends, or choose"):
        StoreLock(url)
    held.release()
    assert "run.lock" not in objects(url)

    monkeypatch.setattr(lock_module, "RENEW_S", 1e6)
    abandoned = StoreLock(url)
    monkeypatch.setattr(lock_module, "ABANDONED_S", 0.5)
    successor = StoreLock(url)
    with pytest.raises(ValueError, match=r"run.lock no longer belongs to this run but to process"):
        abandoned.renew()
    abandoned.release()
    successor.renew()
    successor.release()


def test_one_of_several_runs_takes_over_an_abandoned_lock(url, monkeypatch):
    monkeypatch.setattr(lock_module, "ABANDONED_S", 1.0)
    monkeypatch.setattr(lock_module, "POLL_S", 0.1)
    WritableStore(url, SHORT).put("run.lock", b"process 1 on a machine that is gone 0 0")
    monkeypatch.setattr(lock_module, "RENEW_S", 0.2)
    locks: list[StoreLock] = []
    refused: list[str] = []

    def acquire() -> None:
        try:
            locks.append(StoreLock(url))
        except ValueError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=acquire) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(locks) == 1
    assert len(refused) == 3
    locks[0].release()


@pytest.mark.parametrize("location", ["ftp://host/run", "https://host/run", "file:///run"])
def test_the_error_about_a_read_only_url_names_the_writable_kinds(location):
    with pytest.raises(ValueError, match=rf"{location} cannot be written to; give a folder, s3://, gs:// or az://"):
        StoreLock(location)


def test_a_missing_bucket_is_named(url):
    with pytest.raises(
        ValueError, match=r"s3://no-such-bucket/run/run.lock cannot be written: there is no such bucket"
    ):
        StoreLock("s3://no-such-bucket/run")


def test_uploaded_objects_are_equal_to_the_files_of_the_folder(machines, url, tmp_path):
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


def test_a_folder_in_use_is_refused_with_its_holder_until_the_lock_is_released(tmp_path):
    lock = FolderLock(tmp_path)
    for _ in range(2):
        with pytest.raises(
            ValueError, match=rf"{tmp_path} is in use by process {os.getpid()} on \S+; wait until it ends"
        ):
            FolderLock(tmp_path)
    lock.release()
    FolderLock(tmp_path).release()
    assert [path.name for path in tmp_path.iterdir()] == ["run.lock"]


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_an_error(tmp_path, monkeypatch, number):
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", fail)
    message = rf"{tmp_path} is on a file system without locks \({os.strerror(number)}\).*choose an `out` elsewhere"
    with pytest.raises(ValueError, match=message):
        FolderLock(tmp_path)


def test_a_lock_that_cannot_be_opened_is_not_taken_for_a_file_system_without_locks(tmp_path):
    (tmp_path / "run.lock").mkdir()
    with pytest.raises(ValueError, match=r"run\.lock cannot be locked \(Is a directory\); make it a writable file"):
        FolderLock(tmp_path)
