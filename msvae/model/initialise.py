"""How adapters begin: at random, or as a projection of the spectrum that is known to be good."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from msvae.bands import Bands
from msvae.model.adapters import BandAdapter
from msvae.shards.manifest import LeafStatistics

SMALLEST_STD = 1e-6
CHANNEL_SPREAD = 0.5
"""Standard deviation of each channel that a projection hands to the backbone, which was trained on -1..1."""


@torch.no_grad()
def initialise(
    inwards: BandAdapter | None,
    outwards: BandAdapter | None,
    bands: Bands,
    how: str,
    statistics: LeafStatistics | None,
) -> None:
    """Set the adapters that there are to a projection: `random` leaves them, `rgb` or `pca` make them exact.

    Raises: ValueError for an unknown name, or a projection without statistics.
    """
    if how == "random":
        return
    if how not in ("rgb", "pca"):
        raise ValueError(f"adapter_init is {how!r}, expected `random`, `rgb` or `pca`")
    if statistics is None:
        raise ValueError(f"adapter_init `{how}` needs the leaf statistics of a manifest; pass statistics=…")
    project = rgb_projection if how == "rgb" else pca_projection
    for adapter, projection in zip((inwards, outwards), project(bands, statistics), strict=True):
        if adapter is not None:
            _set_linear(adapter.linear, projection)


def pca_projection(bands: Bands, statistics: LeafStatistics) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Principal components of reflectance, as maps of standardised bands: (3, C) inwards and (C, 3) outwards."""
    std = _spread(statistics)
    eigenvalues, eigenvectors = np.linalg.eigh(np.asarray(statistics.covariance))
    components = eigenvectors[:, ::-1][:, :3]
    spread = np.sqrt(np.maximum(eigenvalues[::-1][:3], 1e-12)) / CHANNEL_SPREAD
    inwards, outwards = np.zeros((3, len(bands))), np.zeros((len(bands), 3))
    inwards[: components.shape[1]] = (components / spread).T * std
    outwards[:, : components.shape[1]] = components * spread / std[:, None]
    return inwards, outwards


def rgb_projection(bands: Bands, statistics: LeafStatistics) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Red, green and blue as themselves, the other bands by least squares: (3, C) inwards, (C, 3) outwards."""
    std = _spread(statistics)
    correlation = np.asarray(statistics.covariance) / np.outer(std, std)
    rgb = [bands.index(role) for role in ("red", "green", "blue")]
    inwards = np.zeros((3, len(bands)))
    inwards[range(3), rgb] = CHANNEL_SPREAD
    outwards = correlation[:, rgb] @ np.linalg.pinv(correlation[np.ix_(rgb, rgb)])
    outwards[rgb] = np.eye(3)
    return inwards, outwards / CHANNEL_SPREAD


def _spread(statistics: LeafStatistics) -> NDArray[np.float64]:
    """Standard deviation of each band; a constant band counts as barely varying."""
    return np.maximum(statistics.std, SMALLEST_STD)


def _set_linear(linear: nn.Conv2d, weight: NDArray[np.float64]) -> None:
    linear.weight.copy_(torch.from_numpy(weight)[:, :, None, None])
    assert linear.bias is not None
    linear.bias.zero_()
