"""What a reconstruction must beat: a few principal components of each spectrum, and the mean leaf spectrum."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def principal_components(tiles_BCHW: Tensor, mean: Sequence[float], covariance: Sequence[Sequence[float]]) -> Tensor:
    """Each spectrum through its first three principal components over training leaves and back, (B, C, H, W)."""
    centre = torch.tensor(mean, dtype=torch.float64)
    _, eigenvectors = torch.linalg.eigh(torch.tensor(covariance, dtype=torch.float64))
    components = eigenvectors[:, -3:]
    projection = (components @ components.T).to(tiles_BCHW.device)
    centre_11 = centre.to(tiles_BCHW.device)[:, None, None]
    return torch.einsum("cd,bdhw->bchw", projection, tiles_BCHW.double() - centre_11) + centre_11


def mean_spectrum(tiles_BCHW: Tensor, mean: Sequence[float]) -> Tensor:
    """The mean spectrum of training leaves in every pixel, (B, C, H, W)."""
    return torch.tensor(mean, dtype=torch.float64, device=tiles_BCHW.device)[:, None, None].expand_as(tiles_BCHW)
