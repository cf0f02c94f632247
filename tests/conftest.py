"""Fixtures and functions for all tests: small shards of synthetic leaves, and launches of real processes."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent
RICE = ROOT.parent / "shared" / "data" / "rice"

# Set before torch is imported, so that two processes fit on a small machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")

settings.register_profile("shared machines", deadline=None)
settings.load_profile("shared machines")

Launch = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def rice() -> Path:
    if not RICE.is_dir():
        pytest.skip(f"needs the images of a rice field in {RICE}")
    return RICE


@pytest.fixture(scope="session")
def leaf_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from msvae.synthetic.images import synthesise

    out = tmp_path_factory.mktemp("leaves") / "images"
    synthesise(out, num_images=8, size_px=96, seed=3)
    return out


@pytest.fixture(scope="session")
def leaf_shards(leaf_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train/ with about 40 tiles of 32 px in several shards; val/ and test/ have fewer."""
    from msvae.packing.options import PackOptions
    from msvae.packing.pack import pack

    out = tmp_path_factory.mktemp("shards") / "leaves"
    pack([leaf_images], out, PackOptions(tile_px=32, tiles_per_shard=7))
    return out


@contextmanager
def disk_of(size: str, folder: Path) -> Iterator[Path]:
    """Mount a file system of this size (as for `mount -o size=`) at `folder`, or skip the test."""
    folder.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder]).returncode:
        pytest.skip("needs permission to mount a small file system")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """File system of 256 kB."""
    with disk_of("256k", tmp_path / "disk") as disk:
        yield disk


@pytest.fixture(scope="session")
def moto(leaf_shards: Path) -> Iterator[tuple[str, int]]:
    """Host and port of an S3 server with `leaf_shards` below the prefix `field/shards`."""
    from .servers import s3_server

    with s3_server(leaf_shards, "field/shards") as host_and_port:
        yield host_and_port


@pytest.fixture(scope="session")
def launch() -> Launch:
    """Function that runs a script in `processes` real processes and waits for them."""

    def run(
        script: Path | str, *arguments: object, processes: int = 2, engine: str = "cpu", precision: str = "no"
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            launch_command(script, *arguments, processes=processes, engine=engine, precision=precision),
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=300,
        )

    return run


def launch_command(
    script: Path | str, *arguments: object, processes: int, engine: str = "cpu", precision: str = "no"
) -> list[str]:
    """Return the command `accelerate launch` with a configuration of `configs/accelerate/`."""
    config = ROOT / "configs" / "accelerate" / f"{engine}.yaml"
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    options = ["--num_processes", str(processes), "--mixed_precision", precision]
    return [*launcher, *options, str(script), *map(str, arguments)]


def documented_commands(page: str) -> list[list[str]]:
    """Return every command in the bash blocks of a page of docs/, with this Python as interpreter."""
    programs = {"msvae": ["msvae"], "accelerate": ["accelerate.commands.accelerate_cli"]}
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "docs" / page).read_text(), flags=re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    commands = [shlex.split(line, comments=True) for line in lines]
    return [[sys.executable, "-m", *programs[program], *words] for program, *words in commands]


def tiny_run(shards: Path, out: Path, **overrides: object) -> list[str]:
    """Return the arguments of a short training on small tiles. In names of overrides, `__` replaces the dot."""
    values: dict[str, object] = {
        "model__pretrained": "tiny",
        "model__train_backbone": "all",
        "model__adapter_width": 8,
        "data__train": shards / "train",
        "data__val": shards / "val",
        "data__global_batch_size": 8,
        "data__micro_batch_size": 2,
        "data__num_workers": 1,
        "optim__lr": 1e-3,
        "optim__warmup_steps": 2,
        "train__max_steps": 4,
        "out": out,
        **overrides,
    }
    return [part for name, value in values.items() for part in (f"--{name.replace('__', '.')}", str(value))]
