"""Names, tags and matching of bands."""

from __future__ import annotations

import pytest

from msvae.bands import DEFAULT_WAVELENGTHS_NM, Bands


@pytest.mark.parametrize(
    ("wavelengths_nm", "tags"),
    [
        ((474.73, 850.59), ["475nm", "851nm"]),
        ((700.2, 700.4, 850.0), ["700.2nm", "700.4nm", "850.0nm"]),
        ((700.0, 700.0), ["700nm_1", "700nm_2"]),
    ],
)
def test_every_band_has_a_unique_and_short_tag(wavelengths_nm, tags):
    assert Bands.of_wavelengths(wavelengths_nm).tags == tags
    assert list(Bands.of_wavelengths(wavelengths_nm).names) == tags


@pytest.mark.parametrize(
    ("names", "indices"),
    [
        (("NIR", "RedEdge", "Red", "Green", "Blue"), [4, 3, 2, 1, 0]),
        (("Red edge", "nir", "BLUE", "red", "green"), [2, 4, 3, 0, 1]),
        (("Band 1", "Band 2", "Band 3", "Band 4", "Band 5"), [0, 1, 2, 3, 4]),
        (("B2", "B3", "B4", "B5", "B8"), None),
        (("Band 5", "Band 4", "Band 3", "Band 2", "Band 1"), None),
        (("blue", "blue", "red", "green", "nir"), None),
        (("blue", "green", "red", "nir"), None),
    ],
)
@pytest.mark.parametrize("named", [True, False])
def test_bands_are_matched_by_name_in_any_spelling_else_by_role(names, indices, named):
    bands = Bands() if named else Bands.of_wavelengths(DEFAULT_WAVELENGTHS_NM)
    assert bands.indices_in(names) == indices


@pytest.mark.parametrize("names", [("蓝", "绿", "红", "红边", "近红外"), ("R+", "R-", "G", "B", "N")])
def test_equal_names_match_in_any_alphabet(names):
    bands = Bands(DEFAULT_WAVELENGTHS_NM, names)
    assert bands.indices_in(names) == [0, 1, 2, 3, 4]
    assert bands.indices_in(names[::-1]) == [4, 3, 2, 1, 0]


def test_equal_names_have_priority_over_numbers_in_names():
    assert Bands((840, 560, 475), ("B3", "B2", "B1")).indices_in(("b1", "b2", "b3")) == [2, 1, 0]
