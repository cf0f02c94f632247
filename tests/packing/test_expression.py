"""Conditions on bands give the same masks as NumPy, and anything else is refused."""

from __future__ import annotations

import numpy as np
import pytest

from msvae.bands import Bands
from msvae.packing.options import PackOptions
from msvae.packing.pack import pack
from msvae.rasters.expression import Expression

FIVE = Bands((475.0, 560.0, 668.0, 717.0, 840.0), ("blue", "green", "red", "red_edge", "nir"))


def leaf(text, **bands):
    """Return the leaf mask of one row of pixels."""
    return Expression.parse(text).leaf({name: np.array([values], float) for name, values in bands.items()})[0].tolist()


def ratio(first, second):
    return (first - second) / (first + second)


@pytest.mark.parametrize(
    ("text", "reference"),
    [
        ("(nir-red)/(nir+red)>0.3 and green<0.4", lambda b, g, r, e, n: (ratio(n, r) > 0.3) & (g < 0.4)),
        ("not (ndvi > .2 or ndre <= -0.1)", lambda b, g, r, e, n: (ratio(n, r) <= 0.2) & (ratio(n, e) > -0.1)),
        ("0.1 < gndvi <= 0.5", lambda b, g, r, e, n: (ratio(n, g) > 0.1) & (ratio(n, g) <= 0.5)),
        ("2*GREEN - red - Blue >= 5e-2", lambda b, g, r, e, n: 2 * g - r - b >= 0.05),
        ("2.5*(nir-red)/(nir+6*red+1) > -(-0.2)", lambda b, g, r, e, n: 2.5 * (n - r) / (n + 6 * r + 1) > 0.2),
        ("nir > 0.2 and nir < 0.9 or blue > 0.95", lambda b, g, r, e, n: ((n > 0.2) & (n < 0.9)) | (b > 0.95)),
    ],
)
def test_arithmetic_over_bands_equals_numpy(tmp_path, write_raster, read_tars, text, reference):
    values = np.random.default_rng(3).integers(1, 10_000, (5, 32, 32), dtype=np.uint16)
    image = write_raster(tmp_path / "a.tif", values, scale=1e-4, names=FIVE.names)
    pack([image], tmp_path / "out", PackOptions(tile_px=32, split=(1, 0, 0), min_coverage=0, mask=text))
    (sample,) = read_tars(tmp_path / "out" / "train").values()
    expected = reference(*(values * 1e-4))
    assert 0 < expected.sum() < expected.size
    np.testing.assert_array_equal(sample["mask.png"], expected)


@pytest.mark.parametrize(
    "text", ["nir/red > 2", "not nir/red > 2", "nir/red > 2 or nir > 0", "1/(nir/red) < 9", "nir/red < 9"]
)
def test_a_quotient_by_zero_is_background(text):
    with_zero = leaf(text, nir=[0.5, 0.0, 0.5, np.nan, np.inf], red=[0.0, 0.0, 0.1, 0.1, 0.1])
    assert with_zero[:2] == [False, False] and with_zero[3:] == [False, False]
    assert any(leaf(text, nir=[0.5, 0.1], red=[0.1, 0.4]))


def test_an_index_that_divides_by_zero_is_background():
    assert leaf("ndvi>0.1", nir=[0.0, 0.5], red=[0.0, 0.1]) == [False, True]


@pytest.mark.parametrize(("index", "other"), [("ndvi", "red"), ("ndre", "red_edge"), ("gndvi", "green")])
def test_indices_treat_negative_reflectance_as_0_and_stay_within_bounds(index, other):
    bands = {"nir": [-0.006, 0.02, 0.02, -0.02, 0.4], other: [-0.002, -0.0199, -0.03, 0.0201, 0.1]}
    expected = [np.nan, 1.0, 1.0, -1.0, 0.6]
    reflectance = {name: np.array([values]) for name, values in bands.items()}
    np.testing.assert_allclose(Expression.parse(f"otsu({index})").quantity(reflectance)[0], expected)
    assert leaf(f"{index}>0.3", **bands) == [False, True, True, False, True]
    assert leaf(f"{index}>-9", **bands) == [False, True, True, True, True]
    assert leaf(f"{index}>-9", **{"nir": [-np.inf, 0.4], other: [0.1, -np.inf]}) == [False, False]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("ndvi", "ndvi is not a condition"),
        ("ndvi>", "cannot be read"),
        ("", "cannot be read"),
        ("ndvi>0.1; import os", "cannot be read"),
        ("ndvi==0.1", "not allowed"),
        ("ndvi>0.1 or 1", "not a condition"),
        ("(ndvi>0.1)+1>0", "not a number"),
        ("not ndvi", "not a condition"),
        ("__import__('os')>1", "not allowed"),
        ("abs(ndvi)>0.1", "not allowed"),
        ("ndvi.real>0.1", "not allowed"),
        ("ndvi[0]>0.1", "not allowed"),
        ("(lambda: ndvi)>0.1", "not allowed"),
        ("(x:=ndvi)>0.1", "not allowed"),
        ("'a'*9>ndvi", "not allowed"),
        ("True>ndvi", "not allowed"),
        ("1j>ndvi", "not allowed"),
        ("1e999>ndvi", "not allowed"),
        ("ndvi**2>0.1", "not allowed"),
        ("2<<9>ndvi", "not allowed"),
        ("(ndvi>0.1) & (green<0.4)", "& is not allowed; write `and`"),
        ("(ndvi>0.1) | (green<0.4)", "| is not allowed; write `or`"),
        ("~(ndvi>0.1)", "~ is not allowed; write `not`"),
        ("nir/0>1", "divides by zero"),
        ("2>1", "names no band"),
        ("nir>0 and " * 40 + "nir>0", "longer than 300"),
        ("-" * 40 + "nir>0", "nested more than 30"),
        ("(" * 148 + "nir", "cannot be read"),
        ("otsu", "needs one quantity, such as otsu(ndvi)"),
        ("otsu()", "needs one quantity"),
        ("otsu(ndvi, red)", "needs one quantity"),
        ("otsu(ndvi>0.1)", "is not a number"),
        ("otsu(ndvi)>0.2", "otsu(ndvi) > 0.2 has an operand that is not a number"),
        ("otsu(otsu(ndvi))", "not a number"),
        ("otsu(ndvi) and otsu(red)", "it holds otsu() 2 times"),
        ("otsu(ndvi=3)", "needs one quantity"),
        ("otsu(2)", "names no band"),
    ],
)  # fmt: skip
def test_anything_but_arithmetic_and_comparisons_is_refused(text, why):
    with pytest.raises(ValueError, match=r"got --mask .*expected auto, or a condition such as") as caught:
        Expression.parse(text)
    assert why in str(caught.value) and "\n" not in str(caught.value)


def test_an_unknown_band_name_is_refused_with_a_list_of_known_names():
    for text in ("evi>0.1", "otsu(evi)", "ndvi>nan"):
        with pytest.raises(ValueError, match="is not a band, expected one of blue, green, red, red_edge, nir, ndvi"):
            Expression.parse(text).band_indices(FIVE)


def test_an_index_without_its_band_is_refused():
    with pytest.raises(ValueError, match="ndre needs nir and red_edge"):
        Expression.parse("ndre>0.1").band_indices(Bands.of_wavelengths((475, 560, 668, 840)))


def test_band_names_have_precedence_over_roles():
    bands = Bands((668.0, 840.0, 560.0), ("green", "nir", "b3"))
    assert Expression.parse("green<nir").band_indices(bands) == {"green": 0, "nir": 1}
    assert Expression.parse("red<B3").band_indices(bands) == {"red": 0, "B3": 2}
