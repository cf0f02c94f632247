"""Bands are told apart wherever they are named."""

from __future__ import annotations

import pytest

from msvae.bands import Bands


@pytest.mark.parametrize(
    ("wavelengths_nm", "tags"),
    [
        ((474.73, 850.59), ["475nm", "851nm"]),
        ((700.2, 700.4, 850.0), ["700.2nm", "700.4nm", "850.0nm"]),
        ((700.0, 700.0), ["700nm_1", "700nm_2"]),
    ],
)
def test_every_band_has_a_tag_of_its_own_as_short_as_may_be(wavelengths_nm, tags):
    assert Bands.of_wavelengths(wavelengths_nm).tags == tags
    assert list(Bands.of_wavelengths(wavelengths_nm).names) == tags
