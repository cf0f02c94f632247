"""Principal components of blocks of pixels: the best linear code of as many numbers as a latent cell has.

B batch, C bands, H, W pixels, h, w blocks, D = C x side x side numbers a block.
"""

from __future__ import annotations

import torch
from torch import Tensor

QUANTUM = 2.0**-15
"""Reflectance is rounded to this for fitting alone: sums of products of whole numbers are exact, so the components do
not depend on how the tiles were split over ranks."""
LARGEST = 2**16
MAX_BLOCKS = 2**20
"""So many products below 2^32 add up exactly in float64."""
MAX_NUMBERS = 2048
"""Of a block: more would take minutes and gigabytes."""


def fill(tiles_BCHW: Tensor, leaf_mask_B1HW: Tensor, mean_C: Tensor) -> Tensor:
    """The mean leaf spectrum wherever there is no finite leaf value, as `data.background: fill` does; float64."""
    shown = leaf_mask_B1HW & tiles_BCHW.isfinite()
    return torch.where(shown, tiles_BCHW.double(), mean_C.to(tiles_BCHW.device, torch.float64)[:, None, None])


class BlockScatter:
    """Sums over the blocks of filled tiles that hold any leaf; `sums` can be added over ranks."""

    def __init__(self, num_numbers: int, side_px: int, mean_C: Tensor, device: torch.device) -> None:
        self._side_px, self._mean_C = side_px, mean_C.to(device, torch.float64)
        self.sums = {
            "count": torch.zeros((), dtype=torch.float64, device=device),
            "total": torch.zeros(num_numbers, dtype=torch.float64, device=device),
            "product": torch.zeros(num_numbers, num_numbers, dtype=torch.float64, device=device),
        }

    def add(self, tiles_BCHW: Tensor, leaf_mask_B1HW: Tensor) -> None:
        """Take in tiles."""
        centred = fill(tiles_BCHW, leaf_mask_B1HW, self._mean_C) - self._mean_C[:, None, None]
        whole = (centred / QUANTUM).round().clamp(-LARGEST, LARGEST)
        has_leaf = to_blocks(leaf_mask_B1HW.double(), self._side_px).amax(dim=-1) > 0
        blocks_ND = to_blocks(whole, self._side_px)[has_leaf]
        self.sums["count"] += len(blocks_ND)
        self.sums["total"] += blocks_ND.sum(dim=0)
        self.sums["product"] += blocks_ND.T @ blocks_ND


def components(sums: dict[str, Tensor], num_kept: int) -> tuple[Tensor, Tensor]:
    """Mean block less the mean spectrum, (D,), and the components, (D, num_kept), in reflectance, on the CPU."""
    count, total, product = (sums[name].cpu() for name in ("count", "total", "product"))
    mean = total / count.clamp(min=1)
    covariance = product / count.clamp(min=1) - torch.outer(mean, mean)
    _, eigenvectors = torch.linalg.eigh(covariance)
    return mean * QUANTUM, eigenvectors[:, -num_kept:]


def through_components(
    tiles_BCHW: Tensor, leaf_mask_B1HW: Tensor, mean_C: Tensor, mean_D: Tensor, components_DK: Tensor, side_px: int
) -> Tensor:
    """Filled tiles through their components and back, (B, C, H, W) float64."""
    device = tiles_BCHW.device
    mean_C, mean_D, components_DK = (x.to(device, torch.float64) for x in (mean_C, mean_D, components_DK))
    centred = fill(tiles_BCHW, leaf_mask_B1HW, mean_C) - mean_C[:, None, None]
    kept = (to_blocks(centred, side_px) - mean_D) @ components_DK
    return from_blocks(kept @ components_DK.T + mean_D, tiles_BCHW.shape[1], side_px) + mean_C[:, None, None]


def to_blocks(maps_BCHW: Tensor, side_px: int) -> Tensor:
    """Square blocks, (B, h, w, D)."""
    batch, channels, height, width = maps_BCHW.shape
    cut = maps_BCHW.reshape(batch, channels, height // side_px, side_px, width // side_px, side_px)
    return cut.permute(0, 2, 4, 1, 3, 5).reshape(batch, height // side_px, width // side_px, -1)


def from_blocks(blocks_BhwD: Tensor, channels: int, side_px: int) -> Tensor:
    """The way back, (B, C, H, W)."""
    batch, rows, columns, _ = blocks_BhwD.shape
    cut = blocks_BhwD.reshape(batch, rows, columns, channels, side_px, side_px)
    return cut.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels, rows * side_px, columns * side_px)
