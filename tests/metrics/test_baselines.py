"""Baselines of an evaluation: PCA of blocks, and image codecs at a given size."""

from __future__ import annotations

import imagecodecs
import numpy as np
import pytest
import torch

from msvae.metrics.codecs import CODECS, HEADER_BYTES, code_tile
from msvae.metrics.pca import BlockScatter, fill_background, fit_blocks, from_blocks, project_blocks, to_blocks

SIDE, BANDS = 4, 3
MEAN = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)


def tiles(num_tiles: int = 6, side: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    """Return smooth tiles (N, 3, side, side) and leaf masks."""
    generator = torch.Generator().manual_seed(4)
    coarse = torch.rand(num_tiles, BANDS, 4, 4, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bilinear")
    leaf = torch.ones(num_tiles, 1, side, side, dtype=torch.bool)
    return smooth * 0.5 + 0.01 * torch.randn(smooth.shape, generator=generator), leaf


def fitted(parts: list[tuple[torch.Tensor, torch.Tensor]], num_components: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum each part as a rank does, add the sums, and fit the components."""
    scatters = [BlockScatter(BANDS * SIDE**2, SIDE, MEAN, torch.device("cpu")) for _ in parts]
    for scatter, (some, leaf) in zip(scatters, parts, strict=True):
        scatter.add(some, leaf)
    joined = {name: sum(scatter.sums[name] for scatter in scatters) for name in scatters[0].sums}
    return fit_blocks(joined, num_components)


def test_from_blocks_inverts_to_blocks():
    some, _ = tiles()
    assert torch.equal(from_blocks(to_blocks(some, SIDE), BANDS, SIDE), some)
    assert torch.equal(to_blocks(some, SIDE)[1, 2, 3], some[1, :, 8:12, 12:16].flatten())


def test_pca_of_blocks_is_the_best_linear_code_with_as_many_values():
    some, leaf = tiles()
    recon = project_blocks(some, leaf, MEAN, *fitted([(some, leaf)], 5), SIDE)
    blocks = to_blocks(some.double(), SIDE).reshape(-1, BANDS * SIDE**2).numpy()
    centred = blocks - blocks.mean(axis=0)
    u, s, vt = np.linalg.svd(centred, full_matrices=False)
    best = (u[:, :5] * s[:5]) @ vt[:5] + blocks.mean(axis=0)
    np.testing.assert_allclose(to_blocks(recon, SIDE).reshape(blocks.shape).numpy(), best, atol=2e-4)
    error = np.square(to_blocks(recon, SIDE).reshape(blocks.shape).numpy() - blocks).sum()
    assert error == pytest.approx(np.square(best - blocks).sum(), rel=1e-4)


def test_components_do_not_depend_on_how_tiles_are_split_over_ranks():
    some, leaf = tiles()
    leaf[2, :, :, :10] = False
    leaf[4] = False
    expected = fitted([(some, leaf)], 5)
    for cuts in ((1, 5), (2, 2, 2), (4, 1, 1)):
        parts = list(zip(some.split(cuts), leaf.split(cuts), strict=True))
        for part, whole in zip(fitted(parts[::-1], 5), expected, strict=True):
            assert torch.equal(part, whole)


@pytest.mark.parametrize("junk", [float("nan"), float("inf"), 1e9])
def test_background_changes_no_component_and_no_leaf_pixel(junk):
    some, leaf = tiles()
    leaf[:, :, :, :7] = False
    dirty = torch.where(leaf, some, junk)
    expected, found = (fitted([(x, leaf)], 5) for x in (some, dirty))
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    recons = [project_blocks(x, leaf, MEAN, *expected, SIDE) for x in (some, dirty)]
    assert torch.equal(*recons)
    assert torch.equal(fill_background(dirty, leaf, MEAN)[0, :, 0, 0], MEAN)


def leaf_like(side: int = 64) -> np.ndarray:
    some, _ = tiles(1, side)
    filled = some[0].double().numpy()
    filled[:, :, : side // 3] = MEAN.numpy()[:, None, None]
    return filled


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("max_bytes", [700, 1000, 2500, 9000])
def test_a_codec_uses_nearly_all_of_the_allowed_bytes_and_never_more(name, max_bytes):
    tile = leaf_like()
    coded = code_tile(tile, max_bytes, CODECS[name])
    assert coded is not None
    assert 0.93 * max_bytes <= coded.num_bytes <= max_bytes
    assert coded.reflectance.shape == tile.shape


@pytest.mark.parametrize("name", CODECS)
def test_more_bytes_reduce_the_error(name):
    tile = leaf_like()
    errors = [np.square(code_tile(tile, n, CODECS[name]).reflectance - tile).mean() for n in (700, 2500, 9000)]
    assert errors[0] > 1.5 * errors[1] > 3 * errors[2]
    assert errors[2] < 1e-4**2 * 400


@pytest.mark.parametrize("name", CODECS)
def test_a_tile_that_does_not_fit_is_none(name):
    assert code_tile(leaf_like(), 90, CODECS[name]) is None
    assert code_tile(leaf_like(), HEADER_BYTES, CODECS[name]) is None


@pytest.mark.parametrize("name", CODECS)
def test_a_tile_of_one_value_is_decoded_exactly(name):
    coded = code_tile(np.full((2, 32, 32), 0.25), 600, CODECS[name])
    assert np.abs(coded.reflectance - 0.25).max() < 1e-6


def test_the_reported_size_is_the_size_of_the_codes_that_are_decoded():
    """The test decodes the recorded codes of JPEG XL itself."""
    tile = leaf_like()
    written: list[bytes] = []
    codec = CODECS["jpeg_xl"]

    def encode(grey: np.ndarray, quality: float) -> bytes:
        written.append(codec.encode(grey, quality))
        return written[-1]

    coded = code_tile(tile, 2500, codec._replace(encode=encode))
    tries = [written[i : i + BANDS] for i in range(0, len(written), BANDS)]
    (chosen,) = [codes for codes in tries if sum(map(len, codes)) == coded.num_bytes - HEADER_BYTES]
    low, high = np.float32(tile.min()), np.float32(tile.max())
    grey = np.stack([imagecodecs.jpegxl_decode(code) for code in chosen])
    np.testing.assert_allclose(coded.reflectance, grey / 65535 * (float(high) - float(low)) + float(low), atol=1e-12)
