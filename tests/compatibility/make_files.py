"""Make the folder `files/`: shards, a backbone, a run, latents, configurations, and the results that tests expect.

The stored files were made by the code of commit 6360586, with torch 2.13.0 and diffusers 0.42.1, on one CPU thread.
The tests need files of that code: later code must not replace them. Run this script with that code:

    git worktree add ../before 6360586
    OMP_NUM_THREADS=1 PYTHONPATH=../before python tests/compatibility/make_files.py FOLDER

FOLDER must not exist. The script removes the files of a run that name the machine (`run_card.json`, `run.lock`,
`tensorboard/`) and those that a resume does not read (`model/`, `untrained/`).
"""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import typing
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from diffusers import AutoencoderKL
from PIL import Image
from pydantic import BaseModel

import msvae
from msvae.config import Config

BEFORE = Path(msvae.__file__).resolve().parents[1]
BACKBONE = {
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "block_out_channels": (2, 2, 2),
    "layers_per_block": 1,
    "latent_channels": 2,
    "norm_num_groups": 1,
    "scaling_factor": 1.0,
    "shift_factor": 0.0,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
RUN = {
    "model": {"pretrained": "backbone", "adapter_width": 4},
    "data": {
        "train": "shards/none/train",
        "val": "shards/none/val",
        "global_batch_size": 2,
        "micro_batch_size": 1,
        "num_workers": 0,
    },
    "optim": {"lr": 0.01, "warmup_steps": 0, "schedule": "constant", "ema_decay": 0.5},
    "train": {"max_steps": 2, "eval_every": 0},
    "out": "run",
}
"""Paths are relative, since a checkpoint is resumed only with the paths that it was made with."""
STEPS_OF_THE_WHOLE_RUN = 4
KEPT_OF_THE_RUN = ("config.yaml", "metrics.jsonl", "validation.jsonl", "checkpoints", "best")
VALUES_FOR_NULL = {"data.cache": "cache", "data.crop_px": 16, "optim.backbone_lr": 1e-5}


def main(files: Path) -> None:
    files.mkdir(parents=True)
    make_shards(files)
    torch.manual_seed(0)
    AutoencoderKL(**BACKBONE).save_pretrained(files / "backbone")
    make_runs(files)
    run(files, "-m", "msvae", "encode", "run/best", "shards/none", "latents")
    make_expected_reconstruction(files)
    make_configurations(files)


def run(folder: Path, *arguments: object) -> None:
    environment = {**os.environ, "PYTHONPATH": str(BEFORE)}
    subprocess.run([sys.executable, *map(str, arguments)], cwd=folder, env=environment, check=True)


def make_shards(files: Path) -> None:
    """Shards with and without compression: 32 px tiles of three bands, two tiles in a shard."""
    # The modules have these names in commit 6360586. Do not rename them here when they move.
    from msvae.pack.job import pack
    from msvae.pack.options import PackOptions

    run(files, "-m", "msvae", "synth", "leaves", "--images", 3, "--size", 64, "--seed", 5)
    for compression in ("none", "delta-blosc2"):
        options = PackOptions(
            bands=("green", "red", "nir"),
            tile_px=32,
            min_coverage=0.5,
            split=(0.7, 0.3, 0),
            split_by="image",
            tiles_per_shard=2,
            compression=compression,
        )
        out = files / "shards" / compression
        pack([files / "leaves"], out, options)
        (out / "contact-sheet.png").unlink()
    # One compressed tile is enough, and small.
    shutil.rmtree(files / "shards" / "delta-blosc2" / "train")
    shutil.rmtree(files / "leaves")


def make_runs(files: Path) -> None:
    """Train two steps, which are stored, and four steps, of which only the losses are stored."""
    config = files / "run.yaml"
    config.write_text(yaml.safe_dump(RUN))
    launcher = ["-m", "accelerate.commands.launch", "--config_file", BEFORE / "configs" / "accelerate" / "cpu.yaml"]
    train = [*launcher, "--num_processes", 1, BEFORE / "train" / "train.py", "--config", "run.yaml"]
    run(files, *train)
    run(files, *train, "--train.max_steps", STEPS_OF_THE_WHOLE_RUN, "--out", "whole-run")
    losses = {
        name: {row["step"]: row["loss"] for row in map(json.loads, (files / "whole-run" / name).open())}
        for name in ("metrics.jsonl", "validation.jsonl")
    }
    (files / "expected").mkdir()
    (files / "expected" / "losses.json").write_text(json.dumps(losses, indent=1) + "\n")
    shutil.rmtree(files / "whole-run")
    config.unlink()
    for path in (files / "run").iterdir():
        if path.name not in KEPT_OF_THE_RUN:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def make_expected_reconstruction(files: Path) -> None:
    """Reflectance (1, C, H, W), float32, that the trained model reconstructs of the only validation tile."""
    split = files / "shards" / "none" / "val"
    with tarfile.open(split / "leaf-000000.tar") as tar:
        tile, mask = (
            tar.extractfile(next(member for member in tar if member.name.endswith(ending))).read()
            for ending in (".bands.npy", ".mask.png")
        )
    scale = np.array(json.loads((split / "manifest.json").read_text())["scale"], np.float32)[:, None, None]
    sample = torch.from_numpy(np.load(io.BytesIO(tile)) * scale)[None]
    leaf_mask = torch.from_numpy(np.array(Image.open(io.BytesIO(mask))))[None, None]
    model = msvae.AutoencoderKLMultispectralAdapter.from_pretrained(files / "run" / "best")
    with torch.no_grad():
        reconstruction, _ = model(sample=sample, mask=leaf_mask)
    np.save(files / "expected" / "reconstruction.npy", reconstruction.numpy())


def make_configurations(files: Path) -> None:
    """Copy the shipped configurations, and set every key to a value that is not its default."""
    shutil.copytree(BEFORE / "configs" / "train", files / "configs")
    values: dict[str, Any] = {}
    for name, field in Config.model_fields.items():
        if isinstance(field.default, BaseModel):
            section = type(field.default).model_fields
            values[name] = {key: another_value(f"{name}.{key}", inner) for key, inner in section.items()}
        else:
            values[name] = another_value(name, field)
    dumped = Config(**values).model_dump(mode="json")
    (files / "configs" / "every-key.yaml").write_text(yaml.safe_dump(dumped, sort_keys=False))


def another_value(key: str, field: Any) -> Any:
    default, choices = field.default, typing.get_args(field.annotation)
    if key in VALUES_FOR_NULL:
        return VALUES_FOR_NULL[key]
    if isinstance(default, bool):
        return not default
    if isinstance(default, int):
        return default + 1
    if isinstance(default, float):
        return default / 2 if default else 0.25
    if isinstance(default, tuple):
        return tuple(part / 2 for part in default)
    return next((choice for choice in choices if isinstance(choice, str) and choice != default), f"other/{default}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
