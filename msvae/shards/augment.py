"""Random flips, quarter turns and crops of training tiles on the device, a pure function of seed and sample."""

from __future__ import annotations

import torch
from torch import Tensor

from msvae.shards.order import hash_key

STREAM = 0xA06
"""Part of the hash that separates these random numbers from others with the same seed and sample."""


class Augmentation:
    """Random flips, quarter turns and crops. The mask of a tile always changes in the same way as the tile.

    Args:
        seed: seed of the run.
        flips: mirror tiles at random.
        quarter_turns: rotate tiles by a random multiple of 90 degrees.
        crop_px: side of a random square crop, in pixels; None keeps the whole tile.
    """

    def __init__(self, seed: int, *, flips: bool, quarter_turns: bool, crop_px: int | None) -> None:
        self._seed, self._flips, self._quarter_turns, self._crop_px = seed, flips, quarter_turns, crop_px

    def __call__(self, tiles: Tensor, leaf_mask: Tensor, samples: range) -> tuple[Tensor, Tensor]:
        """Return augmented tiles (B, C, H, W) and leaf mask (B, 1, H, W).

        `samples` holds the index of each tile in the endless sequence of samples. The change of a tile depends on this
        index alone, so it is the same at every world size and different in every epoch.
        """
        if not (self._flips or self._quarter_turns or self._crop_px):
            return tiles, leaf_mask
        changed = [self._change(tiles[i], leaf_mask[i], sample) for i, sample in enumerate(samples)]
        return torch.stack([tile for tile, _ in changed]), torch.stack([mask for _, mask in changed])

    def _change(self, tile: Tensor, mask: Tensor, sample: int) -> tuple[Tensor, Tensor]:
        bits = hash_key(STREAM, self._seed, sample)
        bits, mirrored = divmod(bits, 2)
        bits, turns = divmod(bits, 4)
        size = self._crop_px or tile.shape[-1]
        free = tile.shape[-1] - size + 1
        bits, top = divmod(bits, free)
        left = bits % free
        changed = []
        for image in (tile, mask):
            part = image[:, top : top + size, left : left + size]
            if self._flips and mirrored:
                part = part.flip(-1)
            changed.append(part.rot90(turns, (-2, -1)) if self._quarter_turns and turns else part)
        return changed[0], changed[1]
