"""What latents look like on the leaf: sums for each tile, float64, every latent cell weighted by its leaf share."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from msvae.metrics.accumulate import TileSums

ACTIVE_VARIANCE = 0.01
"""A channel whose posterior mean varies less says nothing (Burda, Grosse, Salakhutdinov 2016)."""


def latent_sums(mean_BKhw: Tensor, logvar_BKhw: Tensor, leaf_share_Bhw: Tensor) -> dict[str, Tensor]:
    """Of each tile `cells` (B,), its sum of leaf shares; and (B, K) `latent` and `latent_squared`, of posterior
    means, `posterior_std`, and `kl`, nats from N(0, 1). Cells are weighted as the KL of the loss weighs them.
    """
    share = leaf_share_Bhw[:, None].double()
    mean, logvar = mean_BKhw.double(), logvar_BKhw.double()
    maps = {
        "latent": mean,
        "latent_squared": mean.square(),
        "posterior_std": (logvar / 2).exp(),
        "kl": 0.5 * (mean.square() + logvar.exp() - 1 - logvar),
    }
    # a cell without leaf may hold anything
    sums = {name: torch.where(share > 0, values * share, 0.0).sum(dim=(2, 3)) for name, values in maps.items()}
    return {"cells": share.sum(dim=(1, 2, 3)), **sums}


def latent_numbers(sums: TileSums) -> dict[str, Any]:
    """Of a split: `mean_per_channel`, `std_per_channel` (of posterior means over leaf cells), mean
    `posterior_std_per_channel`, `kl_per_channel_nats` a cell, and how many channels are active.
    """
    joined = {name: column.sum(axis=0) for name, column in sums.items()}
    mean, squared, posterior_std, kl = (
        joined[name] / joined["cells"] for name in ("latent", "latent_squared", "posterior_std", "kl")
    )
    variance = np.maximum(squared - np.square(mean), 0)
    return {
        "leaf_cells": float(joined["cells"]),
        "mean_per_channel": mean.tolist(),
        "std_per_channel": np.sqrt(variance).tolist(),
        "posterior_std_per_channel": posterior_std.tolist(),
        "kl_per_channel_nats": kl.tolist(),
        "active_channels": int((variance > ACTIVE_VARIANCE).sum()),
    }
