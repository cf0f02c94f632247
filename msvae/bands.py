"""Spectral bands: their names, wavelengths, roles such as red or near infrared, and statistics of reflectance."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, NonNegativeInt

from msvae.messages import counted

DEFAULT_NAMES = ("blue", "green", "red", "red_edge", "nir")
DEFAULT_WAVELENGTHS_NM = (474.73, 538.71, 650.665, 730.635, 850.59)

RANGES_NM = {  # a band has a role if its wavelength is in this range
    "blue": (430.0, 510.0),
    "green": (510.0, 590.0),
    "red": (610.0, 690.0),
    "red_edge": (690.0, 760.0),
    "nir": (760.0, 950.0),
}
NORMALISED_DIFFERENCES = {"ndvi": ("nir", "red"), "ndre": ("nir", "red_edge")}
"""Roles of the two bands a and b of each vegetation index (a - b) / (a + b)."""
MIN_INDEX_SUM = 1e-3
"""Smallest denominator a + b of an index, in reflectance. Smaller sums are noise and are replaced by this value."""
CENTRES_NM = {"blue": 475.0, "green": 550.0, "red": 665.0, "red_edge": 720.0, "nir": 840.0}


@dataclass(frozen=True)
class Bands:
    """Bands in the order in which tiles store them. `wavelengths_nm` and `names` have one entry per band.

    Raises: ValueError if the two have different lengths.
    """

    wavelengths_nm: tuple[float, ...] = DEFAULT_WAVELENGTHS_NM
    names: tuple[str, ...] = DEFAULT_NAMES

    def __post_init__(self) -> None:
        if len(self.wavelengths_nm) != len(self.names):
            raise ValueError(
                f"got {counted(len(self.names), 'band name')} for {counted(len(self.wavelengths_nm), 'wavelength')}; "
                "give one name and one wavelength for every band"
            )

    def __len__(self) -> int:
        return len(self.names)

    def __str__(self) -> str:
        wavelengths = ", ".join(f"{nm:.0f}" for nm in self.wavelengths_nm)
        return f"{counted(len(self), 'band')} ({wavelengths} nm)"

    @property
    def tags(self) -> list[str]:
        """Label of each band from its wavelength, such as `475nm`, with enough decimals to make labels unique."""
        return _tags(self.wavelengths_nm)

    @classmethod
    def of_wavelengths(cls, wavelengths_nm: Sequence[float]) -> Bands:
        """Return bands with names from their wavelengths, such as `475nm`."""
        return cls(tuple(wavelengths_nm), tuple(_tags(wavelengths_nm)))

    @classmethod
    def named(cls, wavelengths_nm: Sequence[float], names: Sequence[str] | None = None) -> Bands:
        """Return bands with the given names.

        Without names, the default wavelengths have the default names, and others have names such as `475nm`.
        """
        if not names and tuple(wavelengths_nm) != DEFAULT_WAVELENGTHS_NM:
            return cls.of_wavelengths(wavelengths_nm)
        return cls(tuple(wavelengths_nm), tuple(names) if names else DEFAULT_NAMES)

    def index(self, role: str) -> int:
        """Return the index of the band with the role `blue`, `green`, `red`, `red_edge` or `nir`, by its wavelength.

        Raises: ValueError if no band is in the spectral range of the role.
        """
        low, high = RANGES_NM[role]
        inside = [i for i, nm in enumerate(self.wavelengths_nm) if low <= nm < high]
        if not inside:
            raise ValueError(f"got {self}, expected one from {low:.0f} to {high:.0f} nm as {role}")
        return min(inside, key=lambda i: abs(self.wavelengths_nm[i] - CENTRES_NM[role]))

    def index_pairs(self) -> dict[str, tuple[int, int]]:
        """Return the indices of the two bands of each vegetation index that these bands allow."""
        return {
            name: (self.index(first), self.index(second))
            for name, (first, second) in NORMALISED_DIFFERENCES.items()
            if self.has(first, second)
        }

    def indices_in(self, names: Sequence[str]) -> list[int] | None:
        """Return the index of each of these bands in an image whose bands are called `names`.

        Bands are matched by name, else by role. Case and separators are ignored. Names that are only numbered, such
        as `Band 1` to `Band 5`, mean that the bands are in this order. Returns None if the image has other bands.
        """
        if len(names) != len(self):
            return None
        plain, own = [_plain(name) for name in names], [_plain(name) for name in self.names]
        for found, wanted in ((list(names), list(self.names)), (plain, own)):
            if set(found) == set(wanted) and len(set(found)) == len(self):
                return [found.index(name) for name in wanted]
        if _are_numbers_in_order(names):
            return list(range(len(self)))
        roles = {_plain(role): role for role in RANGES_NM}
        if not all(name in roles and self.has(roles[name]) for name in plain):
            return None
        band_of = [self.index(roles[name]) for name in plain]
        return [band_of.index(i) for i in range(len(self))] if len(set(band_of)) == len(self) else None

    def has(self, *roles: str) -> bool:
        """Return whether every role has a band in its spectral range."""
        return all(any(RANGES_NM[r][0] <= nm < RANGES_NM[r][1] for nm in self.wavelengths_nm) for r in roles)


class LeafStatistics(BaseModel):
    """Statistics of reflectance over the leaf pixels of the training split, with one entry per band."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    num_pixels: NonNegativeInt
    """Number of leaf pixels."""
    mean: list[float]
    std: list[float]
    minimum: list[float]
    maximum: list[float]
    covariance: list[list[float]]
    """Covariance matrix of the bands."""
    percentiles: dict[str, list[float]] = {}
    """Percentiles of each band; the keys are percentages such as `"5"`."""
    coverage_histogram: list[NonNegativeInt] = []
    """Number of training tiles by coverage, in ten equal bins from 0 to 1."""


def _plain(name: str) -> str:
    return re.sub(r"[\W_]", "", name.casefold())


def _are_numbers_in_order(names: Sequence[str]) -> bool:
    numbers = [int(number) for name in names for number in re.findall(r"\d+", name)]
    stems = {re.sub(r"\d+", "", name) for name in names}
    return len(stems) == 1 and numbers in (list(range(len(names))), list(range(1, len(names) + 1)))


def _tags(wavelengths_nm: Sequence[float]) -> list[str]:
    for decimals in range(4):
        tags = [f"{nm:.{decimals}f}nm" for nm in wavelengths_nm]
        if len(set(tags)) == len(tags):
            return tags
    return [f"{nm:.0f}nm_{number}" for number, nm in enumerate(wavelengths_nm, 1)]
