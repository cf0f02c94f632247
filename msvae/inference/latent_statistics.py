"""Mean and spread of latents over leaf cells, from sums that join shard by shard. C channels, h, w cells."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from msvae.shards.latents import LatentStatistics


def leaf_sums(
    mean_Chw: NDArray[np.float64], logvar_Chw: NDArray[np.float64], share_hw: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Leaf shares, and weighted by them latents and their squares, summed over the cells of one tile, (1 + 2C,).

    Latents are those drawn from the posterior, so their squares come to mean^2 + variance. Cells weigh as in the KL
    term: by their share of leaf pixels.
    """
    leaf = share_hw > 0
    share = share_hw[leaf]
    mean, variance = mean_Chw[:, leaf], np.exp(logvar_Chw[:, leaf])
    return np.concatenate([[share.sum()], (mean * share).sum(axis=1), ((mean**2 + variance) * share).sum(axis=1)])


def statistics(sums: NDArray[np.float64]) -> LatentStatistics:
    """Mean and standard deviation of each channel. Raises: ValueError when there was no leaf."""
    num_cells, (mean, square) = float(sums[0]), np.split(sums[1:], 2)
    if not num_cells:
        raise ValueError("the split that factors are taken of has no leaf pixel; pack it with another --mask")
    mean = mean / num_cells
    std = np.sqrt(np.maximum(square / num_cells - mean**2, 0))
    return LatentStatistics(num_cells=num_cells, mean=mean.tolist(), std=std.tolist())


def factors(of: LatentStatistics) -> tuple[float, float]:
    """`shift_factor` and `scaling_factor` of diffusers: mean and 1 / standard deviation over all channels at once."""
    mean, square = np.array(of.mean), np.array(of.std) ** 2 + np.array(of.mean) ** 2
    shift = float(mean.mean())
    variance = float(square.mean()) - shift**2
    if variance <= 0:
        raise ValueError("all latents of leaves are the same, so they cannot be scaled; train the model further")
    return shift, 1 / math.sqrt(variance)
