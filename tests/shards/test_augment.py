"""Augmentation moves pixels and nothing else, and depends on seed and sample alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from msvae.shards.augment import Augmentation

TILES = torch.arange(40 * 2 * 8 * 8, dtype=torch.float32).view(40, 2, 8, 8)
MASK = TILES[:, :1] % 3 > 1


def augmented(first: int = 0, tiles: slice = slice(None), **options: object) -> tuple[torch.Tensor, torch.Tensor]:
    choices = {"seed": 1, "flips": True, "quarter_turns": True, "crop_px": None, **options}
    chosen = TILES[tiles]
    start = first + (tiles.start or 0)
    return Augmentation(**choices)(chosen, MASK[tiles], range(start, start + len(chosen)))


def orientation(tile: np.ndarray, original: np.ndarray) -> tuple[bool, int]:
    """Return which of the eight flips and turns produced this tile."""
    ways = {
        (flip, turns): np.rot90(original[..., ::-1] if flip else original, turns, (-2, -1))
        for flip in (False, True)
        for turns in range(4)
    }
    (found,) = [way for way, expected in ways.items() if np.array_equal(tile, expected)]
    return found


def test_all_eight_flips_and_turns_occur_and_the_mask_follows_its_tile():
    tiles, mask = augmented()
    ways = {orientation(tile.numpy(), original.numpy()) for tile, original in zip(tiles, TILES, strict=True)}
    assert len(ways) == 8
    assert torch.equal(mask, tiles[:, :1] % 3 > 1)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"quarter_turns": False}, {(False, 0), (True, 0)}),
        ({"flips": False}, {(False, turns) for turns in range(4)}),
        ({"flips": False, "quarter_turns": False}, {(False, 0)}),
    ],
)
def test_disabled_augmentations_change_nothing(options, expected):
    tiles, _ = augmented(**options)
    assert {orientation(t.numpy(), o.numpy()) for t, o in zip(tiles, TILES, strict=True)} == expected


def test_crops_are_windows_of_the_tile_and_differ():
    tiles, mask = augmented(flips=False, quarter_turns=False, crop_px=5)
    assert tiles.shape == (40, 2, 5, 5)
    assert torch.equal(mask, tiles[:, :1] % 3 > 1)
    corners = set()
    for tile, original in zip(tiles, TILES, strict=True):
        row, column = divmod(int(tile[0, 0, 0] - original[0, 0, 0]), 8)
        assert torch.equal(tile, original[:, row : row + 5, column : column + 5])
        corners.add((row, column))
    assert {row for row, _ in corners} == {column for _, column in corners} == set(range(4))


def test_augmentation_of_a_sample_is_the_same_in_any_batch_and_differs_between_epochs_and_runs():
    whole = augmented()[0]
    parts = torch.cat([augmented(tiles=part)[0] for part in (slice(0, 7), slice(7, 30), slice(30, 40))])
    assert torch.equal(whole, parts)
    assert not torch.equal(whole, augmented(first=1000)[0])
    assert not torch.equal(whole, augmented(seed=2)[0])
