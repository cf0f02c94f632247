"""Build the untrained model of a configuration."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL

from msvae.bands import Bands, LeafStatistics
from msvae.config import LossConfig, ModelConfig
from msvae.model.autoencoder import AutoencoderKLMultispectralAdapter
from msvae.model.initialise import initialise_from_backbone

TINY_BACKBONE: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (8, 16, 32, 64),
    "layers_per_block": 1,
    "latent_channels": 16,
    # one group keeps the ratios between channels, and therefore the colour of a leaf
    "norm_num_groups": 1,
    "scaling_factor": 1.0,
    "shift_factor": 0.0,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
"""Small backbone with the shape of the SD3 VAE (8x downsampling, 16 latent channels), for training on a CPU."""


def build_model(
    config: ModelConfig, loss: LossConfig, background: str, bands: Bands, statistics: LeafStatistics, seed: int
) -> AutoencoderKLMultispectralAdapter:
    """Return the untrained model, equal on every rank, with the trainable parameters that `config` selects.

    Args: sections `model` and `loss` of the configuration; `data.background`; bands and leaf statistics of the
        training split; seed of the random weights.
    Raises: ValueError if `config.pretrained` is a saved model with other bands or adapters.
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
        # measurements of a saved model become invalid when it is trained further
        "metrics": None,
        "band_importance": None,
        "factors_of_leaves": False,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if config.pretrained == "tiny":
            model = AutoencoderKLMultispectralAdapter(
                **TINY_BACKBONE, **options, band_mean=statistics.mean, band_std=statistics.std
            )
            initialise_from_backbone(model, AutoencoderKL(**TINY_BACKBONE), config.adapter_init, statistics)
        else:
            model = AutoencoderKLMultispectralAdapter.from_pretrained(
                config.pretrained, adapter_init=config.adapter_init, statistics=statistics, **options
            )
    model.choose_losses(tuple(loss.weights))
    model.freeze_backbone()
    if config.train_backbone == "decoder":
        model.decoder.requires_grad_(True)
    elif config.train_backbone == "all":
        model.requires_grad_(True)
    return model  # type: ignore[no-any-return]
