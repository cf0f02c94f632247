"""Statistics of latents on the leaf. Every latent cell is weighted by its leaf share, as in the KL of the loss."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from msvae.metrics.aggregate import Sums

ACTIVE_VARIANCE = 0.01
"""Smallest variance of the posterior mean of an active channel (Burda, Grosse, Salakhutdinov 2016)."""


def latent_sums(mean_BKhw: Tensor, logvar_BKhw: Tensor, leaf_share_Bhw: Tensor) -> dict[str, Tensor]:
    """Return sums over the latent cells of each tile, float64, weighted by leaf share.

    Returns: `cells` (B,), the sum of leaf shares; and (B, K) `latent` and `latent_squared` (of the posterior mean),
        `posterior_std`, and `kl` (nats, against N(0, 1)).
    """
    share = leaf_share_Bhw[:, None].double()
    mean, logvar = mean_BKhw.double(), logvar_BKhw.double()
    maps = {
        "latent": mean,
        "latent_squared": mean.square(),
        "posterior_std": (logvar / 2).exp(),
        "kl": 0.5 * (mean.square() + logvar.exp() - 1 - logvar),
    }
    # a cell without leaf may hold NaN or infinity
    sums = {name: torch.where(share > 0, values * share, 0.0).sum(dim=(2, 3)) for name, values in maps.items()}
    return {"cells": share.sum(dim=(1, 2, 3)), **sums}


def latent_statistics(sums: Sums) -> dict[str, Any]:
    """Return the statistics of a split.

    Returns: `leaf_cells`; `mean_per_channel` and `std_per_channel` of posterior means; mean
        `posterior_std_per_channel`; `kl_per_channel_nats` per cell; and `active_channels`, their number.
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
