"""Shards on S3 (moto) and HTTP (nginx): read like those on disk, retried with bounds, and kept on disk when asked."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from msvae.shards.cache import SpanCache
from msvae.shards.loader import Loader
from msvae.shards.order import evaluation_plans
from msvae.shards.reader import ShardReader
from msvae.shards.stores import open_store
from msvae.shards.stores.remote import RetryPolicy
from msvae.shards.stores.store import MissingError

from ..servers import BUCKET, Fault, breaking_proxy, s3_server, set_credentials
from .test_reader import CPU

SHORT = RetryPolicy(attempts=4, first_wait_s=0.01, timeout_s=0.5)


@dataclass
class Remote:
    """A training split behind a server: its URL, and the faults of the server."""

    url: str
    fault: Fault

    def reader(self, cache: SpanCache | None = None) -> ShardReader:
        return ShardReader(self.url, cache, SHORT)


@pytest.fixture(scope="module")
def nginx(leaf_shards, tmp_path_factory) -> Iterator[tuple[str, int]]:
    program = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    if program is None:
        pytest.skip("nginx is not installed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = tmp_path_factory.mktemp("nginx")
    (folder / "nginx.conf").write_text(
        f"""
        user root; daemon off; pid {folder}/pid; error_log {folder}/error.log; events {{}}
        http {{ access_log off; client_body_temp_path {folder}; proxy_temp_path {folder}; fastcgi_temp_path {folder};
                uwsgi_temp_path {folder}; scgi_temp_path {folder};
                server {{ listen 127.0.0.1:{port}; location /field/shards/ {{ alias {leaf_shards}/; }} }} }}
        """
    )
    process = subprocess.Popen([program, "-c", folder / "nginx.conf", "-e", folder / "error.log"])
    for _ in range(100):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.05)
    yield "127.0.0.1", port
    process.terminate()
    process.wait()


def test_google_and_azure_are_read_like_s3(nginx, leaf_shards, tmp_path, monkeypatch):
    """The test server shares only the names of objects with real servers; nginx requires no credentials."""
    endpoint = f"http://{nginx[0]}:{nginx[1]}"
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "scientist")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "c2VjcmV0")
    monkeypatch.setenv("AZURE_STORAGE_ENDPOINT", endpoint)
    account = {"gcs_base_url": endpoint, "disable_oauth": True, "client_email": "", "private_key": ""}
    (tmp_path / "account.json").write_text(json.dumps({**account, "private_key_id": ""}))
    monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT", str(tmp_path / "account.json"))
    near = contents(ShardReader(leaf_shards / "train"))
    for scheme in ("az", "gs"):
        far = contents(ShardReader(f"{scheme}://field/shards/train", None, SHORT))
        assert far.keys() == near.keys()
        assert all(far[key][0].tobytes() == tile.tobytes() for key, (tile, _) in near.items())


def test_azure_without_an_account_is_an_error_with_the_missing_setting(monkeypatch):
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME", raising=False)
    with pytest.raises(ValueError, match=r"shards cannot be opened \(.*Account must be specified\); set what"):
        open_store("az://field/shards")


def test_a_span_is_one_request_and_stops_at_the_end_of_the_file(remote, leaf_shards):
    store, tar = open_store(remote.url, SHORT), (leaf_shards / "train" / "leaf-000000.tar").read_bytes()
    remote.fault.set("", 0, path="leaf-000000.tar")
    for near in (store, open_store(leaf_shards / "train")):
        assert near.read_span("leaf-000000.tar", len(tar) - 700, 2**42) == tar[-700:]
        assert near.read_span("leaf-000000.tar", len(tar), 512) == b""
        assert near.read_span("leaf-000000.tar", 512, 1000) == tar[512:1512]
    assert remote.fault.num_requests == 3


@pytest.fixture(params=["s3", "http"])
def remote(request, monkeypatch) -> Iterator[Remote]:
    host, port = request.getfixturevalue("moto" if request.param == "s3" else "nginx")
    with breaking_proxy(host, port) as (url, fault):
        set_credentials(monkeypatch, url)
        place = f"s3://{BUCKET}/field/shards" if request.param == "s3" else f"{url}/field/shards"
        yield Remote(f"{place}/train", fault)


def contents(reader: ShardReader) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return every sample by its key, read through the loader."""
    plans = evaluation_plans(reader.samples_per_shard, batch_size=8, rank=0, world_size=1)
    loader = Loader(reader, plans, batch_size=8, num_workers=2, device=CPU)
    return {
        key: (tile.numpy(), leaf.numpy())
        for batch in loader
        for key, tile, leaf in zip(batch.keys, batch.tiles, batch.leaf_mask, strict=True)
    }


def read_first(reader: ShardReader) -> tuple[str, np.ndarray]:
    tile, leaf_mask = np.empty(reader.tile_shape, reader.dtype), np.empty(reader.tile_shape[1:], bool)
    return reader.read_into(0, 0, tile, leaf_mask), tile


def test_disk_and_url_return_the_same_samples(remote, leaf_shards):
    near, far = contents(ShardReader(leaf_shards / "train")), contents(remote.reader())
    assert near.keys() == far.keys()
    for key, (tile, leaf_mask) in near.items():
        np.testing.assert_array_equal(far[key][0], tile)
        np.testing.assert_array_equal(far[key][1], leaf_mask)


@pytest.mark.parametrize("kind", ["500", "stall", "cut", "short"])
def test_a_temporary_fault_of_the_server_is_retried(remote, leaf_shards, kind):
    reader = remote.reader()
    remote.fault.set(kind, times=2)
    key, tile = read_first(reader)
    expected_key, expected = read_first(ShardReader(leaf_shards / "train"))
    assert (key, tile.tobytes()) == (expected_key, expected.tobytes())
    assert remote.fault.num_requests == 3, "two that failed, one that did not"


@pytest.mark.parametrize("kind", ["500", "stall", "cut", "short"])
def test_a_permanent_fault_of_the_server_is_an_error_with_the_url(remote, kind):
    reader = remote.reader()
    remote.fault.set(kind, times=1000)
    with pytest.raises(ValueError, match=r"could not be read in 4 attempts .*; check the network") as error:
        read_first(reader)
    assert str(error.value).startswith(f"{remote.url}/leaf-000000.tar")
    assert "\n" not in str(error.value)
    assert remote.fault.num_requests == SHORT.attempts


@pytest.mark.parametrize("path", ["leaf-000001", "leaf-000001.tar"], ids=["with its index", "alone"])
def test_an_unreachable_shard_is_retried_only_once_for_all_its_samples(remote, path):
    retry = RetryPolicy(attempts=3, first_wait_s=0.01, timeout_s=5)
    reader = ShardReader(remote.url, None, retry)
    remote.fault.set("500", times=10**6, path=path)
    plans = evaluation_plans(reader.samples_per_shard, batch_size=1, rank=0, world_size=1)
    lost = reader.samples_per_shard[1]
    found = list(Loader(reader, plans, batch_size=1, num_workers=1, device=CPU, max_bad_samples=lost))
    assert [batch.plan.samples[0].shard for batch in found if batch.bad] == [1] * lost
    assert len({batch.bad[0].replaced_by for batch in found if batch.bad}) == 1
    assert remote.fault.num_requests <= retry.attempts + 1, "one more where the index is there"


@pytest.mark.parametrize("kept_share", [0.9, 0.1])
def test_a_truncated_shard_is_an_error_with_both_sizes(leaf_shards, tmp_path, monkeypatch, kept_share):
    split = Path(shutil.copytree(leaf_shards / "train", tmp_path / "shards" / "train"))
    tar = split / "leaf-000000.tar"
    size = tar.stat().st_size
    cut = int(size * kept_share)
    os.truncate(tar, cut)
    with s3_server(tmp_path / "shards", "cut") as (host, port):
        set_credentials(monkeypatch, f"http://{host}:{port}")
        for place in (split, f"s3://{BUCKET}/cut/train"):
            with pytest.raises(ValueError, match=rf"000000\.tar has {cut} bytes, .* expects {size}"):
                contents(ShardReader(place, None, SHORT))


def test_a_stalled_index_does_not_delay_other_indexes(remote):
    retry = RetryPolicy(attempts=2, first_wait_s=0.01, timeout_s=20)
    reader = ShardReader(remote.url, None, retry)
    remote.fault.set("stall", times=1, path="leaf-000000")
    stalled = threading.Thread(target=reader.key, args=(0, 0), daemon=True)
    stalled.start()
    while remote.fault.num_requests < 1:
        time.sleep(0.01)
    with ThreadPoolExecutor(4) as threads:
        keys = list(threads.map(lambda shard: reader.key(shard, 0), [1, 2, 3, 1]))
    assert stalled.is_alive()
    assert keys[0] == keys[3]
    assert len(set(keys)) == 3


def test_missing_files_are_errors_without_retries(remote):
    with pytest.raises(ValueError, match=r"lost holds no manifest\.json"):
        ShardReader(remote.url.replace("train", "lost"), None, SHORT)
    with pytest.raises(MissingError, match=r"train/leaf-999999\.tar is missing"):
        open_store(remote.url, SHORT).size_bytes("leaf-999999.tar")


def test_wrong_credentials_are_an_error_with_the_fix(moto, monkeypatch):
    host, port = moto
    set_credentials(monkeypatch, f"http://{host}:{port}")
    connection = http.client.HTTPConnection(host, port)
    connection.request("POST", "/moto-api/reset-auth", body=b"0")
    assert connection.getresponse().read()
    try:
        with pytest.raises(ValueError, match=r"access denied; check the credentials") as error:
            ShardReader(f"s3://{BUCKET}/field/shards/train", None, SHORT)
        assert f"s3://{BUCKET}/field/shards/train/manifest.json" in str(error.value)
        assert "secret" not in str(error.value)
    finally:
        connection.request("POST", "/moto-api/reset-auth", body=b"1000000")
        connection.getresponse().read()


def test_an_unknown_scheme_is_an_error_with_the_known_ones():
    with pytest.raises(ValueError, match=r"ftp://field/shards .*give a folder, s3://, gs://, az:// or https://"):
        open_store("ftp://field/shards")


def test_cached_samples_cause_no_requests(remote, tmp_path):
    first = contents(remote.reader(SpanCache(tmp_path / "cache", 10**9)))
    asked = remote.fault.num_requests
    again = contents(remote.reader(SpanCache(tmp_path / "cache", 10**9)))
    assert remote.fault.num_requests == asked
    for key, (tile, leaf_mask) in first.items():
        assert again[key][0].tobytes() == tile.tobytes()
        assert again[key][1].tobytes() == leaf_mask.tobytes()


def test_a_damaged_cache_is_repaired(remote, leaf_shards, tmp_path):
    expected = contents(remote.reader(SpanCache(tmp_path / "cache", 10**9)))
    copies = sorted((tmp_path / "cache").iterdir())
    copies[0].write_bytes(os.urandom(copies[0].stat().st_size))
    os.truncate(copies[1], 1000)
    again = contents(remote.reader(SpanCache(tmp_path / "cache", 10**9)))
    assert all(again[key][0].tobytes() == tile.tobytes() for key, (tile, _) in expected.items())
    remote.fault.set("500", times=1000)
    healed = contents(remote.reader(SpanCache(tmp_path / "cache", 10**9)))
    assert all(healed[key][0].tobytes() == tile.tobytes() for key, (tile, _) in expected.items())


def test_the_cache_removes_only_its_own_copies(remote, leaf_shards, tmp_path):
    folder = tmp_path / "cache"
    shutil.copytree(leaf_shards / "train", folder)
    mine = {path.name: path.read_bytes() for path in folder.iterdir()}
    contents(remote.reader(SpanCache(folder, 50_000)))
    assert {name: (folder / name).read_bytes() for name in mine} == mine


def test_the_cache_stays_within_its_limit(remote, tmp_path):
    cache, bound = SpanCache(tmp_path / "cache", 200_000), 200_000
    reader = remote.reader(cache)
    tile, leaf_mask = np.empty(reader.tile_shape, reader.dtype), np.empty(reader.tile_shape[1:], bool)
    used = []
    for shard, num_samples in enumerate(reader.samples_per_shard):
        for row in range(num_samples):
            reader.read_into(shard, row, tile, leaf_mask)
            used.append(sum(path.stat().st_blocks * 512 for path in (tmp_path / "cache").iterdir()))
    assert max(used) <= bound
    assert max(used) > bound / 3, "it is used"


def test_a_full_disk_under_the_cache_is_a_warning(remote, small_disk):
    with pytest.warns(UserWarning, match=r"cannot be written \(No space left on device\)"):
        seen = contents(remote.reader(SpanCache(small_disk / "cache", 10**9)))
    assert len(seen) == sum(remote.reader().samples_per_shard)


def test_paths_of_a_store_equal_those_of_pathlib():
    for folder in ("tiles", "/tiles", ".", "/", "tiles/"):
        store = open_store(folder)
        assert store.path("leaf.tar") == str(Path(folder) / "leaf.tar")
        assert store.path("") == str(Path(folder))
