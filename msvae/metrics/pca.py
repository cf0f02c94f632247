"""Linear baselines: the mean spectrum, principal components of spectra, and principal components of blocks of pixels.

Dimensions: B tiles of a batch, C bands, H, W pixels, h, w blocks, D = C x side x side values of a block, K components.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

QUANTUM = 2.0**-15
"""Rounding step of reflectance for the fit. Sums of products of integers are exact, so the components do not depend on
how the tiles were split over ranks."""
LARGEST = 2**16
"""Largest rounded value, in steps."""
MAX_BLOCKS = 2**20
"""Largest number of blocks for a fit. The float64 sum of this many products below 2^32 is exact."""
MAX_VALUES = 2048
"""Largest number of values of a block. A fit of longer blocks would need minutes and gigabytes."""


def mean_spectrum(tiles_BCHW: Tensor, mean: Sequence[float]) -> Tensor:
    """Return the mean spectrum of training leaves in every pixel, (B, C, H, W)."""
    return torch.tensor(mean, dtype=torch.float64, device=tiles_BCHW.device)[:, None, None].expand_as(tiles_BCHW)


def project_spectra(tiles_BCHW: Tensor, mean: Sequence[float], covariance: Sequence[Sequence[float]]) -> Tensor:
    """Project each spectrum onto the first three principal components of training leaves, (B, C, H, W)."""
    centre = torch.tensor(mean, dtype=torch.float64)
    _, eigenvectors = torch.linalg.eigh(torch.tensor(covariance, dtype=torch.float64))
    components = eigenvectors[:, -3:]
    projection = (components @ components.T).to(tiles_BCHW.device)
    centre_11 = centre.to(tiles_BCHW.device)[:, None, None]
    return torch.einsum("cd,bdhw->bchw", projection, tiles_BCHW.double() - centre_11) + centre_11


def fill_background(tiles_BCHW: Tensor, leaf_mask_B1HW: Tensor, mean_C: Tensor) -> Tensor:
    """Replace every value that is not a finite leaf value by the mean leaf spectrum, as `data.background: fill` does.

    Returns: (B, C, H, W) float64.
    """
    shown = leaf_mask_B1HW & tiles_BCHW.isfinite()
    return torch.where(shown, tiles_BCHW.double(), mean_C.to(tiles_BCHW.device, torch.float64)[:, None, None])


class BlockScatter:
    """Sums over the blocks of filled tiles that contain leaf, for `fit_blocks`. `sums` can be added over ranks."""

    def __init__(self, num_values: int, side_px: int, mean_C: Tensor, device: torch.device) -> None:
        self._side_px, self._mean_C = side_px, mean_C.to(device, torch.float64)
        self.sums = {
            "count": torch.zeros((), dtype=torch.float64, device=device),
            "total": torch.zeros(num_values, dtype=torch.float64, device=device),
            "product": torch.zeros(num_values, num_values, dtype=torch.float64, device=device),
        }

    def add(self, tiles_BCHW: Tensor, leaf_mask_B1HW: Tensor) -> None:
        """Add the blocks of a batch."""
        centred = fill_background(tiles_BCHW, leaf_mask_B1HW, self._mean_C) - self._mean_C[:, None, None]
        whole = (centred / QUANTUM).round().clamp(-LARGEST, LARGEST)
        has_leaf = to_blocks(leaf_mask_B1HW.double(), self._side_px).amax(dim=-1) > 0
        blocks_ND = to_blocks(whole, self._side_px)[has_leaf]
        self.sums["count"] += len(blocks_ND)
        self.sums["total"] += blocks_ND.sum(dim=0)
        self.sums["product"] += blocks_ND.T @ blocks_ND


def fit_blocks(sums: dict[str, Tensor], num_components: int) -> tuple[Tensor, Tensor]:
    """Return the mean block minus the mean spectrum, (D,), and the first components, (D, K), on the CPU."""
    count, total, product = (sums[name].cpu() for name in ("count", "total", "product"))
    mean = total / count.clamp(min=1)
    covariance = product / count.clamp(min=1) - torch.outer(mean, mean)
    _, eigenvectors = torch.linalg.eigh(covariance)
    return mean * QUANTUM, eigenvectors[:, -num_components:]


def project_blocks(
    tiles_BCHW: Tensor, leaf_mask_B1HW: Tensor, mean_C: Tensor, mean_D: Tensor, components_DK: Tensor, side_px: int
) -> Tensor:
    """Project each block of the filled tiles onto the components of `fit_blocks`, (B, C, H, W) float64."""
    device = tiles_BCHW.device
    mean_C, mean_D, components_DK = (x.to(device, torch.float64) for x in (mean_C, mean_D, components_DK))
    centred = fill_background(tiles_BCHW, leaf_mask_B1HW, mean_C) - mean_C[:, None, None]
    coefficients = (to_blocks(centred, side_px) - mean_D) @ components_DK
    return from_blocks(coefficients @ components_DK.T + mean_D, tiles_BCHW.shape[1], side_px) + mean_C[:, None, None]


def to_blocks(maps_BCHW: Tensor, side_px: int) -> Tensor:
    """Cut maps into square blocks, (B, h, w, D)."""
    batch, channels, height, width = maps_BCHW.shape
    cut = maps_BCHW.reshape(batch, channels, height // side_px, side_px, width // side_px, side_px)
    return cut.permute(0, 2, 4, 1, 3, 5).reshape(batch, height // side_px, width // side_px, -1)


def from_blocks(blocks_BhwD: Tensor, channels: int, side_px: int) -> Tensor:
    """Join the blocks of `to_blocks` again, (B, C, H, W)."""
    batch, rows, columns, _ = blocks_BhwD.shape
    cut = blocks_BhwD.reshape(batch, rows, columns, channels, side_px, side_px)
    return cut.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels, rows * side_px, columns * side_px)
