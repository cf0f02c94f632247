"""Random flips, quarter turns and crops of training tiles, on the device: a pure function of seed and sample."""

from __future__ import annotations

import torch
from torch import Tensor

from msvae.shards.order import hash_key

STREAM = 0xA06
"""Keeps these draws apart from others that are made of the same seed and sample."""


class Augmentation:
    """What may happen to a tile. A tile and its mask always move together.

    Args: seed of the run; whether tiles are mirrored, and turned; side of the square that is cut out, None for all.
    """

    def __init__(self, seed: int, *, flips: bool, quarter_turns: bool, crop_px: int | None) -> None:
        self._seed, self._flips, self._quarter_turns, self._crop_px = seed, flips, quarter_turns, crop_px

    def __call__(self, tiles: Tensor, leaf_mask: Tensor, samples: range) -> tuple[Tensor, Tensor]:
        """Tiles (B, C, H, W) and leaf mask (B, 1, H, W), each changed as its place in the endless sequence of samples
        decides: alike at every world size, anew in every epoch.
        """
        if not (self._flips or self._quarter_turns or self._crop_px):
            return tiles, leaf_mask
        changed = [self._change(tiles[i], leaf_mask[i], sample) for i, sample in enumerate(samples)]
        return torch.stack([tile for tile, _ in changed]), torch.stack([mask for _, mask in changed])

    def _change(self, tile: Tensor, mask: Tensor, sample: int) -> tuple[Tensor, Tensor]:
        draws = hash_key(STREAM, self._seed, sample)
        draws, mirrored = divmod(draws, 2)
        draws, turns = divmod(draws, 4)
        size = self._crop_px or tile.shape[-1]
        free = tile.shape[-1] - size + 1
        draws, top = divmod(draws, free)
        left = draws % free
        changed = []
        for image in (tile, mask):
            part = image[:, top : top + size, left : left + size]
            if self._flips and mirrored:
                part = part.flip(-1)
            changed.append(part.rot90(turns, (-2, -1)) if self._quarter_turns and turns else part)
        return changed[0], changed[1]
