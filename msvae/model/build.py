"""Build the untrained model that a configuration describes."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL

from msvae.bands import Bands
from msvae.config import LossConfig, ModelConfig
from msvae.leaf_statistics import LeafStatistics
from msvae.model.autoencoder import AutoencoderKLMultispectralAdapter
from msvae.model.initialise import put_backbone

TINY_BACKBONE: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (8, 16, 32, 64),
    "layers_per_block": 1,
    "latent_channels": 16,
    # one group keeps the ratios between channels, and with them the colour of a leaf
    "norm_num_groups": 1,
    "scaling_factor": 1.0,
    "shift_factor": 0.0,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
"""A small backbone of the SD3 VAE's shape (8x down, 16 latent channels), for training from scratch on a CPU."""


def build_model(
    config: ModelConfig, loss: LossConfig, background: str, bands: Bands, statistics: LeafStatistics, seed: int
) -> AutoencoderKLMultispectralAdapter:
    """The untrained model, equal on every rank; its trainable parameters are those that `config` names.

    Raises: ValueError if a saved model has other bands.
    """
    options: dict[str, Any] = {
        "wavelengths_nm": bands.wavelengths_nm,
        "band_names": bands.names,
        "adapter_placement": config.adapter_placement,
        "adapter_form": config.adapter_form,
        "adapter_width": config.adapter_width,
        "use_spectral_attention": config.use_spectral_attention,
        "use_sam_loss": "sam" in loss.weights,
        "background": background,
        # what was measured of a saved model ends with its next step
        "metrics": None,
        "band_importance": None,
        "factors_of_leaves": False,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if config.pretrained == "tiny":
            model = _tiny(options, config.adapter_init, statistics)
        else:
            model = AutoencoderKLMultispectralAdapter.from_pretrained(
                config.pretrained, adapter_init=config.adapter_init, statistics=statistics, **options
            )
    model.choose_losses(tuple(loss.weights))
    _choose_trained(model, config.train_backbone)
    return model


def _tiny(options: dict[str, Any], adapter_init: str, statistics: LeafStatistics) -> AutoencoderKLMultispectralAdapter:
    model = AutoencoderKLMultispectralAdapter(
        **TINY_BACKBONE, **options, band_mean=statistics.mean, band_std=statistics.std
    )
    put_backbone(model, AutoencoderKL(**TINY_BACKBONE), model.bands, adapter_init, statistics)
    return model  # type: ignore[no-any-return]


def _choose_trained(model: AutoencoderKLMultispectralAdapter, train_backbone: str) -> None:
    model.freeze_backbone()
    if train_backbone == "decoder":
        model.decoder.requires_grad_(True)
    elif train_backbone == "all":
        model.requires_grad_(True)
