"""What must stay the same for a resumed run to be the same run, and what may change."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from msvae.config import Config

MANIFEST, FROZEN = "manifest_digest", "frozen_parameters"
"""Digests among what identifies a run: they tell that something differs, not what."""


def identity(config: Config, manifest_digest: str, model: nn.Module) -> dict[str, Any]:
    """What must stay the same for a resumed run to be the same run, key by key.

    Frozen parameters are no part of a checkpoint: their digest tells when the backbone is another one.
    """
    values = config.model_dump(mode="json")
    return {
        MANIFEST: manifest_digest,
        "train.seed": config.train.seed,
        "data.global_batch_size": config.data.global_batch_size,
        **{f"data.{name}": values["data"][name] for name in ("background", "flips", "quarter_turns", "crop_px")},
        FROZEN: _frozen_digest(model),
        **{f"model.{name}": value for name, value in values["model"].items()},
    }


def check_identity(path: str, state: Mapping[str, Any], current: Mapping[str, Any], config: Config) -> None:
    """Compare the identity in the state of a checkpoint with that of the run at hand.

    Raises: ValueError naming each thing that differs.
    """
    saved = state["identity"]
    differing = [key for key, value in current.items() if saved.get(key) != value]
    told = {
        MANIFEST: _data_that_differ(state["config"]["data"]["train"], config.data.train),
        FROZEN: "the frozen weights differ (model.pretrained names another backbone, or its files have changed)",
    }
    if differing:
        texts = [told.get(key, f"{key}: {saved.get(key)} -> {current[key]}") for key in differing]
        raise ValueError(
            f"{path} belongs to another run ({'; '.join(texts)}); put these back, or choose another `out`"
        )


def _data_that_differ(before: str, now: str) -> str:
    if before != now:
        return f"the training data differ: data.train: {before} -> {now}"
    return f"the training data differ: {now} was packed or indexed anew since"


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
