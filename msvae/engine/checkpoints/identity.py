"""What must stay the same for a resumed run to be the same run, and what may change."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from msvae.config import Config


def identity(config: Config, manifest_digest: str, model: nn.Module) -> dict[str, Any]:
    """What must stay the same for a resumed run to be the same run, key by key.

    Frozen parameters are no part of a checkpoint: their digest tells when the backbone is another one.
    """
    values = config.model_dump(mode="json")
    return {
        "manifest_digest": manifest_digest,
        "train.seed": config.train.seed,
        "data.global_batch_size": config.data.global_batch_size,
        **{f"data.{name}": values["data"][name] for name in ("background", "flips", "quarter_turns", "crop_px")},
        "frozen_parameters": _frozen_digest(model),
        **{f"model.{name}": value for name, value in values["model"].items()},
    }


def check_identity(path: Path, saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Compare the identity in a checkpoint with that of the run at hand.

    Raises: ValueError listing each key that differs.
    """
    differing = [f"{key}: {saved.get(key)} -> {value}" for key, value in current.items() if saved.get(key) != value]
    if differing:
        raise ValueError(
            f"{path} belongs to another run ({'; '.join(differing)}); put these back, or choose another `out`"
        )


def changes(saved: Mapping[str, Any], current: Mapping[str, Any]) -> str:
    """What of the configuration is not as it was, to be said after "resumed"; empty when nothing is."""
    before, after = _flat(saved), _flat(current)
    differing = [f"{key} {before.get(key)} -> {after.get(key)}" for key in after if before.get(key) != after[key]]
    return f", with changed {', '.join(differing)}" if differing else ""


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    sections = {name: value if isinstance(value, Mapping) else {"": value} for name, value in config.items()}
    return {f"{name}.{key}".rstrip("."): value for name, section in sections.items() for key, value in section.items()}


def _frozen_digest(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            digest.update(name.encode())
            digest.update(parameter.detach().contiguous().view(torch.uint8).cpu().numpy().data)
    return digest.hexdigest()
