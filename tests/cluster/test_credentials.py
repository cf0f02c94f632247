"""Credentials stay in the environment: a run on a store writes them nowhere, and a URL with credentials is refused."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import boto3
import pytest

from msvae.config import load_config
from msvae.credentials import check_no_credentials, hide_credentials
from msvae.shards.stores import open_store
from msvae.shards.stores.remote import RetryPolicy, WritableStore

from ..conftest import ROOT, tiny_run
from ..servers import BUCKET, set_credentials

NODE = ["bash", str(ROOT / "launch" / "node.sh")]
PLANTED = {
    "AWS_ACCESS_KEY_ID": "AKIAPLANTEDINTHETEST",
    "AWS_SECRET_ACCESS_KEY": "planted/secret+access+key",
    "AWS_SESSION_TOKEN": "planted-session-token",
    "AZURE_STORAGE_ACCOUNT_KEY": "planted-account-key==",
    "HF_TOKEN": "hf_plantedtoken",
}


@pytest.fixture
def planted(moto, monkeypatch, tmp_path) -> dict[str, str]:
    """Set the environment variables of a user with many secrets, and return the environment."""
    set_credentials(monkeypatch, f"http://{moto[0]}:{moto[1]}")
    for name, value in PLANTED.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "scratch").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "scratch"))
    return dict(os.environ)


def train(out: str, *words: object) -> subprocess.CompletedProcess[bytes]:
    """Train with launch/node.sh, which all launchers share."""
    arguments = tiny_run(Path("s3:/") / BUCKET / "field" / "shards", Path("nowhere"), train__max_steps=2)
    arguments = [word.replace("s3:/", "s3://") for word in arguments]
    command = [*NODE, "train/train.py", *arguments, "--out", out, *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, timeout=200)


def secrets_in(contents: dict[str, bytes]) -> list[tuple[str, str]]:
    secrets = [*PLANTED.values(), "scientist-password"]
    return [(name, secret) for name, content in contents.items() for secret in secrets if secret.encode() in content]


def objects(prefix: str) -> dict[str, bytes]:
    client = boto3.client("s3")
    keys = [one["Key"] for one in client.list_objects_v2(Bucket=BUCKET, Prefix=prefix).get("Contents", [])]
    return {key: client.get_object(Bucket=BUCKET, Key=key)["Body"].read() for key in keys}


def files(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_on_a_store_writes_no_secret_anywhere(planted, tmp_path):
    done = train(f"s3://{BUCKET}/runs/secret", "--train.checkpoint_every", 1)
    assert done.returncode == 0, done.stderr[-3000:]
    written = objects("runs/secret/")
    kinds = ("tensorboard/", "config.yaml", "state.json", "tensors.safetensors", "metrics.jsonl", "model/README.md")
    for kind in kinds:
        assert any(kind in name for name in written), kind
    assert secrets_in(written | files(tmp_path / "scratch") | {"stdout": done.stdout, "stderr": done.stderr}) == []


@pytest.mark.slow
def test_the_error_of_a_store_with_wrong_credentials_does_not_show_them(planted, monkeypatch, tmp_path):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://scientist:scientist-password@127.0.0.1:9")
    done = train(f"s3://{BUCKET}/runs/refused")
    assert done.returncode == 2
    assert b"error: " in done.stderr
    assert secrets_in(files(tmp_path / "scratch") | {"stdout": done.stdout, "stderr": done.stderr}) == []


@pytest.mark.parametrize(
    "url",
    [
        "https://scientist:scientist-password@host/leaves",
        "s3://AKIAPLANTEDINTHETEST:scientist-password@leaves/train",
        "s3://AKIAPLANTEDINTHETEST:scientist-password/with+slash@leaves/train",
        "https://host/leaves?X-Amz-Signature=scientist-password",
        "az://leaves/train?sv=2024&sig=scientist-password",
    ],
)
def test_a_url_with_credentials_is_refused_without_repeating_them(url):
    for use in (check_no_credentials, open_store, lambda url: WritableStore(url, RetryPolicy())):
        with pytest.raises(ValueError, match="holds credentials or a query") as refused:
            use(url)
        assert "scientist-password" not in str(refused.value)


@pytest.mark.parametrize("key", ["data.train", "data.val", "out", "model.pretrained"])
def test_a_configuration_with_credentials_is_refused_without_repeating_them(key):
    with pytest.raises(ValueError, match="command line and overrides: the URL https://…@host/leaves holds") as refused:
        load_config(None, [f"--{key}", "https://scientist:scientist-password@host/leaves"])
    assert "scientist-password" not in str(refused.value)


@pytest.mark.parametrize(
    "text",
    [
        "s3://leaves/plant@noon/train",
        "http://127.0.0.1:9000/leaves/plant@noon",
        "shards/a?b",
        "stabilityai/stable-diffusion",
    ],
)
def test_texts_without_credentials_are_unchanged(text):
    check_no_credentials(text)
    assert hide_credentials(text) == text


def test_a_message_does_not_show_credentials_of_the_environment(monkeypatch):
    for name, value in PLANTED.items():
        monkeypatch.setenv(name, value)
    text = f"403 for {PLANTED['AWS_ACCESS_KEY_ID']} at http://me:scientist-password@store/leaves"
    assert hide_credentials(text) == "403 for $AWS_ACCESS_KEY_ID at http://…@store/leaves"
