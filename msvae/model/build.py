"""From a configuration and a manifest to the model that is trained."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL

from msvae.config import LossConfig, ModelConfig
from msvae.model.autoencoder import AutoencoderKLMultispectralAdapter
from msvae.model.initialise import TINY_BACKBONE, initialise, load_backbone
from msvae.shards.manifest import Manifest


def build_model(
    config: ModelConfig, loss: LossConfig, background: str, manifest: Manifest, seed: int
) -> AutoencoderKLMultispectralAdapter:
    """The untrained model, equal on every rank; its trainable parameters are those that `config` names.

    Raises: ValueError when a saved model has other bands than the manifest.
    """
    options: dict[str, Any] = {
        "wavelengths_nm": tuple(manifest.wavelengths_nm),
        "band_names": tuple(manifest.band_names),
        "adapter_placement": config.adapter_placement,
        "adapter_width": config.adapter_width,
        "use_spectral_attention": config.use_spectral_attention,
        "use_sam_loss": loss.sam_weight > 0,
        "background": background,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if config.pretrained == "tiny":
            model = _tiny(options, config.adapter_init, manifest)
        else:
            model = AutoencoderKLMultispectralAdapter.from_pretrained(
                config.pretrained, adapter_init=config.adapter_init, statistics=manifest.statistics, **options
            )
    _choose_trained(model, config.train_backbone)
    return model


def _tiny(options: dict[str, Any], adapter_init: str, manifest: Manifest) -> AutoencoderKLMultispectralAdapter:
    statistics = {"band_mean": manifest.statistics.mean, "band_std": manifest.statistics.std}
    model = AutoencoderKLMultispectralAdapter(**TINY_BACKBONE, **options, **statistics)
    load_backbone(model, AutoencoderKL(**TINY_BACKBONE))
    initialise(model, adapter_init, manifest.statistics)
    return model  # type: ignore[no-any-return]


def _choose_trained(model: AutoencoderKLMultispectralAdapter, train_backbone: str) -> None:
    model.freeze_backbone()
    if train_backbone == "decoder":
        model.decoder.requires_grad_(True)
    elif train_backbone == "all":
        model.requires_grad_(True)
