"""The run card: everything that is needed to repeat a run."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import msvae
from msvae.config import Config
from msvae.credentials import hide_credentials
from msvae.distributed.collectives import Ranks
from msvae.distributed.setup import launched_precision
from msvae.runs import library_versions

SETTINGS = {
    "model": None,
    "loss": None,
    "optim": None,
    "data": ("global_batch_size", "flips", "quarter_turns", "crop_px", "background"),
    "train": ("max_steps", "seed"),
}
"""Sections of the configuration that determine the result, and the keys in them; None means all keys."""


def run_card(ranks: Ranks, digests: Mapping[str, str]) -> dict[str, str]:
    """Return code, command, data and machine of a run, by name. Args: digest of the manifest of each split."""
    device = ranks.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "git commit": _git_commit() or "none: not run from a checkout",
        "launch command": launch_command(),
        "engine": ranks.engine.name,
        "world size": str(ranks.world_size),
        "precision": launched_precision(),
        "device of rank 0": f"{device.type} ({name}), {platform.node()}",
        **{f"manifest digest, {split}": digest for split, digest in digests.items()},
        "versions": ", ".join(f"{name} {version}" for name, version in library_versions().items()),
    }


def as_list(card: Mapping[str, str]) -> str:
    """Return a run card as a Markdown list."""
    return "\n".join(f"- **{name}**: `{value}`" for name, value in card.items())


def as_code(text: str) -> str:
    """Return a text as a Markdown code block."""
    return f"```\n{text}\n```"


def settings(config: Config) -> dict[str, Any]:
    """Return the values that determine the result, by key, such as `optim.lr`."""
    values = config.model_dump(mode="json")
    return {
        f"{section}.{key}": json.dumps(value) if value is None or isinstance(value, bool | list) else value
        for section, keys in SETTINGS.items()
        for key, value in values[section].items()
        if keys is None or key in keys
    }


def launch_command() -> str:
    """Return the command of the launcher, or of this process if no launcher started it."""
    try:
        words = Path(f"/proc/{os.getppid()}/cmdline").read_text().split("\0")[:-1]
    except (OSError, UnicodeDecodeError):
        words = []
    return hide_credentials(shlex.join(words if sys.argv[0] in words else ["python", *sys.argv]))


def _git_commit() -> str | None:
    """Return the commit of the checkout that holds this package, with `-dirty` if it has uncommitted changes."""
    checkout = Path(msvae.__file__).resolve().parent.parent
    if not (checkout / ".git").exists():
        return None
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
