"""Windows cover a raster, and their contents blend into one image."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from msvae.inference.sliding_window import AxisWindows, Mosaic

SIZES = {"length_px": st.integers(1, 3000), "tile_px": st.integers(1, 8).map(lambda n: 64 * n)}


@given(**SIZES)
def test_weights_of_all_windows_add_up_to_one_at_every_pixel(length_px, tile_px):
    along = AxisWindows(length_px, tile_px, tile_px // 8)
    shown = np.zeros(along.starts[-1] + along.window_px)
    for window, start in enumerate(along.starts):
        weights = along.weights(window)
        assert weights.min() >= 0
        shown[start : start + along.window_px] += weights
    assert len(shown) - length_px in range(8)
    np.testing.assert_allclose(shown, 1, atol=1e-6)


@given(**SIZES, cell_px=st.sampled_from([4, 8, 16]))
def test_windows_start_at_multiples_of_a_latent_cell_and_overlap_by_an_eighth(length_px, tile_px, cell_px):
    along = AxisWindows(length_px, tile_px, tile_px // 8, cell_px)
    assert all(start % cell_px == 0 for start in along.starts)
    assert along.starts[-1] + along.window_px - length_px in range(cell_px)
    assert max(np.diff(along.starts), default=0) <= tile_px - tile_px // 8 + cell_px // 2


@given(**SIZES)
def test_the_border_of_a_window_has_weight_only_at_the_border_of_the_raster(length_px, tile_px):
    along = AxisWindows(length_px, tile_px, tile_px // 8)
    for window in range(len(along.starts)):
        first, last = along.weights(window)[[0, -1]]
        assert (first == 0) == (window > 0)
        assert (last == 0) == (window + 1 < len(along.starts))


@given(**SIZES, begin=st.integers(0, 2999), size=st.integers(1, 500))
def test_touching_lists_every_window_with_weight_in_the_pixels(length_px, tile_px, begin, size):
    along = AxisWindows(length_px, tile_px, tile_px // 8)
    end = min(begin + size, length_px)
    seen = {
        window
        for window, start in enumerate(along.starts)
        if any(along.weights(window)[max(0, begin - start) : max(0, end - start)] > 0)
    }
    assert seen <= set(along.touching(begin, end))


@pytest.mark.parametrize("cols", [range(0, 500), range(100, 300)])
def test_the_windows_of_an_image_blend_into_the_same_image(cols):
    down, across = AxisWindows(333, 64, 8), AxisWindows(500, 128, 16)
    picture = np.random.default_rng(0).random((3, 336, 504), dtype=np.float32)
    mosaic, rows = Mosaic(3, down, across, cols), []
    for i, row in enumerate(down.starts):
        for j in across.touching(cols.start, cols.stop):
            mosaic.add(i, j, picture[:, row : row + 64, across.starts[j] : across.starts[j] + 128])
        rows.append(mosaic.take(down.complete_before(i))[1])
    np.testing.assert_allclose(np.concatenate(rows, axis=1), picture[:, :333, cols.start : cols.stop], rtol=1e-5)
