"""Spectral bands: their names, their wavelengths, and which of them plays red or near infrared."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from msvae.messages import counted

DEFAULT_NAMES = ("blue", "green", "red", "red_edge", "nir")
DEFAULT_WAVELENGTHS_NM = (474.73, 538.71, 650.665, 730.635, 850.59)

RANGES_NM = {
    "blue": (430.0, 510.0),
    "green": (510.0, 590.0),
    "red": (610.0, 690.0),
    "red_edge": (690.0, 760.0),
    "nir": (760.0, 950.0),
}
NORMALISED_DIFFERENCES = {"ndvi": ("nir", "red"), "ndre": ("nir", "red_edge")}
"""(a - b) / (a + b) of two bands, by role."""
MIN_INDEX_SUM = 1e-3
"""Smallest a + b, in reflectance, that an index is divided by: below it is noise."""
CENTRES_NM = {"blue": 475.0, "green": 550.0, "red": 665.0, "red_edge": 720.0, "nir": 840.0}


@dataclass(frozen=True)
class Bands:
    """Bands in the order in which tiles store them. `wavelengths_nm` and `names` have one entry a band."""

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
        """Each band by its wavelength alone, such as `475nm`, as exact as tells bands apart."""
        return _tags(self.wavelengths_nm)

    @classmethod
    def of_wavelengths(cls, wavelengths_nm: Sequence[float]) -> Bands:
        """Bands named by their wavelength alone, such as `475nm`."""
        return cls(tuple(wavelengths_nm), tuple(_tags(wavelengths_nm)))

    @classmethod
    def named(cls, wavelengths_nm: Sequence[float], names: Sequence[str] | None = None) -> Bands:
        """Bands with the names given. Without, the default bands have the default names, others their wavelength."""
        if not names and tuple(wavelengths_nm) != DEFAULT_WAVELENGTHS_NM:
            return cls.of_wavelengths(wavelengths_nm)
        return cls(tuple(wavelengths_nm), tuple(names) if names else DEFAULT_NAMES)

    def index(self, role: str) -> int:
        """Position of the band that plays `blue`, `green`, `red`, `red_edge` or `nir`, found by wavelength.

        Raises: ValueError when no band lies in that part of the spectrum.
        """
        low, high = RANGES_NM[role]
        inside = [i for i, nm in enumerate(self.wavelengths_nm) if low <= nm < high]
        if not inside:
            raise ValueError(f"got {self}, expected one in {low:.0f} to {high:.0f} nm to serve as {role}")
        return min(inside, key=lambda i: abs(self.wavelengths_nm[i] - CENTRES_NM[role]))

    def index_pairs(self) -> dict[str, tuple[int, int]]:
        """Positions of the two bands of each normalised difference that these bands allow."""
        return {
            name: (self.index(first), self.index(second))
            for name, (first, second) in NORMALISED_DIFFERENCES.items()
            if self.has(first, second)
        }

    def places_in(self, names: Sequence[str]) -> list[int] | None:
        """Where each of these bands is in another image, whose bands have `names`: by name, else by role.

        Case and separators do not count, and names such as `Band 1` to `Band 5` say no more than their order. None
        when the names are those of other bands.
        """
        if len(names) != len(self):
            return None
        plain, own = [_plain(name) for name in names], [_plain(name) for name in self.names]
        for found, wanted in ((list(names), list(self.names)), (plain, own)):
            if set(found) == set(wanted) and len(set(found)) == len(self):
                return [found.index(name) for name in wanted]
        if _only_count(names):
            return list(range(len(self)))
        roles = {_plain(role): role for role in RANGES_NM}
        if not all(name in roles and self.has(roles[name]) for name in plain):
            return None
        band_of = [self.index(roles[name]) for name in plain]
        return [band_of.index(i) for i in range(len(self))] if len(set(band_of)) == len(self) else None

    def has(self, *roles: str) -> bool:
        """Whether a band lies in the spectral range of every role."""
        return all(any(RANGES_NM[r][0] <= nm < RANGES_NM[r][1] for nm in self.wavelengths_nm) for r in roles)


def _plain(name: str) -> str:
    return re.sub(r"[\W_]", "", name.casefold())


def _only_count(names: Sequence[str]) -> bool:
    numbers = [int(number) for name in names for number in re.findall(r"\d+", name)]
    stems = {re.sub(r"\d+", "", name) for name in names}
    return len(stems) == 1 and numbers in (list(range(len(names))), list(range(1, len(names) + 1)))


def _tags(wavelengths_nm: Sequence[float]) -> list[str]:
    for decimals in range(4):
        tags = [f"{nm:.{decimals}f}nm" for nm in wavelengths_nm]
        if len(set(tags)) == len(tags):
            return tags
    return [f"{nm:.0f}nm_{number}" for number, nm in enumerate(wavelengths_nm, 1)]
