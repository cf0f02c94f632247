"""Which model this is, by what decides its latents and how they are decoded."""

from __future__ import annotations

import hashlib
import json

import torch

from msvae.model.autoencoder import AutoencoderKLMultispectralAdapter

WITHOUT_EFFECT = (
    "backbone",
    "backbone_licence",
    "shift_factor",
    "scaling_factor",
    "factors_of_leaves",
    "metrics",
    "band_importance",
    "use_sam_loss",
)
"""Entries of a config that change neither latents nor reconstructions."""


def model_sha256(model: AutoencoderKLMultispectralAdapter) -> str:
    """Digest of weights and config; the factors that encoding adds to the config are no part of it."""
    config = {
        name: value for name, value in model.config.items() if not name.startswith("_") and name not in WITHOUT_EFFECT
    }
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().contiguous().view(torch.uint8).cpu().numpy().data)
    return digest.hexdigest()
