"""What all images of a data set must have in common: bands in one order, one stored type, one scale."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msvae.bands import DEFAULT_NAMES, DEFAULT_WAVELENGTHS_NM, Bands
from msvae.pack.raster import RasterInfo

WAVELENGTH_TOLERANCE_NM = 20.0


@dataclass(frozen=True)
class Layout:
    """How tiles are stored: reflectance = stored * scale + offset, one scale and offset a band."""

    bands: Bands
    dtype: str
    scale: tuple[float, ...]
    offset: tuple[float, ...]
    wavelengths_stated: bool
    notices: tuple[str, ...] = ()

    def reflectance(self, stored: NDArray[Any], bands: Sequence[int] | None = None) -> NDArray[np.float64]:
        """Reflectance in float64 of stored values (C, …): of all bands, or of those that are named."""
        chosen = slice(None) if bands is None else list(bands)
        one_a_band = (-1,) + (1,) * (stored.ndim - 1)
        scale = np.array(self.scale)[chosen].reshape(one_a_band)
        offset = np.array(self.offset)[chosen].reshape(one_a_band)
        reflectance: NDArray[np.float64] = stored[chosen] * scale + offset
        return reflectance


def first_layout(
    path: Path, info: RasterInfo, wavelengths_nm: Sequence[float] | None, scale: float | None
) -> tuple[Layout, list[int]]:
    """The layout that the first image sets for all others, and which of its bands fill it.

    Raises: ValueError when bands or scale can be neither read from the image nor taken from the options.
    """
    positions, bands, notice = _first_bands(path, info, wavelengths_nm)
    scales, offsets, scale_notice = _scale(path, info, positions, scale)
    notices = tuple(line for line in (notice, scale_notice) if line)
    return Layout(bands, info.dtype, scales, offsets, info.wavelengths_nm is not None, notices), positions


def fit_layout(
    path: Path, info: RasterInfo, layout: Layout, wavelengths_nm: Sequence[float] | None, scale: float | None
) -> list[int]:
    """Which bands of a further image fill the layout.

    Raises: ValueError when its bands, type or scale differ.
    """
    if info.dtype != layout.dtype:
        raise ValueError(
            f"{path} holds {info.dtype} but the first image {layout.dtype}; convert one (gdal_translate -ot), "
            "or pack them as two data sets"
        )
    if wavelengths_nm is None and (info.wavelengths_nm is not None) != layout.wavelengths_stated:
        states, first = ("states", "does not") if info.wavelengths_nm else ("does not state", "does")
        raise ValueError(f"{path} {states} wavelengths but the first image {first}; give --wavelengths for all images")
    if wavelengths_nm is None and len(info.scales) != len(layout.bands):
        raise ValueError(
            f"{path} holds {info.describe_bands()} but the first image {layout.bands}; "
            "choose common bands with --wavelengths, or pack them as two data sets"
        )
    wanted = layout.bands.wavelengths_nm if wavelengths_nm is None else wavelengths_nm
    if info.wavelengths_nm:
        positions = _nearest(path, info, info.wavelengths_nm, wanted)
    else:
        positions = _in_order(path, info, len(wanted))
        if info.names and set(info.names) == set(layout.bands.names):
            positions = [info.names.index(name) for name in layout.bands.names]
    scales, offsets, _ = _scale(path, info, positions, scale)
    if (scales, offsets) != (layout.scale, layout.offset):
        raise ValueError(
            f"{path} states scale {scales} and offset {offsets} but the first image {layout.scale} and "
            f"{layout.offset}; give --scale for all images, or pack them as two data sets"
        )
    return positions


def _first_bands(path: Path, info: RasterInfo, wanted: Sequence[float] | None) -> tuple[list[int], Bands, str | None]:
    num_bands = len(info.scales)
    if info.wavelengths_nm:
        stated = info.wavelengths_nm
        positions = list(range(num_bands)) if wanted is None else _nearest(path, info, stated, wanted)
        return positions, _named(info, positions, [stated[i] for i in positions]), None
    if wanted is not None:
        positions = _in_order(path, info, len(wanted))
        return positions, _named(info, positions, wanted), None
    if num_bands != len(DEFAULT_NAMES):
        raise ValueError(
            f"{path} holds {info.describe_bands()} and states no wavelengths; give --wavelengths, one in nm for "
            "every band, or --band-files if each band is a file of its own"
        )
    bands = Bands()
    roles = [re.sub(r"[^a-z]", "", name.lower()) for name in info.names or ()]
    by_role = {name.replace("_", ""): nm for name, nm in zip(DEFAULT_NAMES, DEFAULT_WAVELENGTHS_NM, strict=True)}
    if info.names and set(roles) == set(by_role):
        bands = Bands(tuple(by_role[role] for role in roles), info.names)
    elif info.names:
        bands = replace(bands, names=info.names)
    pairs = zip(bands.names, bands.wavelengths_nm, strict=True)
    assumed = ", ".join(f"{name} {nm:.0f}" for name, nm in pairs)
    notice = f"no wavelengths stated: assumed {assumed} nm; give --wavelengths if that is wrong"
    return list(range(num_bands)), bands, notice


def _named(info: RasterInfo, positions: Sequence[int], wavelengths_nm: Sequence[float]) -> Bands:
    if info.names is None:
        return Bands.of_wavelengths(wavelengths_nm)
    return Bands(tuple(wavelengths_nm), tuple(info.names[i] for i in positions))


def _in_order(path: Path, info: RasterInfo, num_wanted: int) -> list[int]:
    if len(info.scales) != num_wanted:
        raise ValueError(
            f"{path} holds {info.describe_bands()} and states no wavelengths, but {num_wanted} are asked for; "
            "give --wavelengths with one in nm for every band, or complete the raster"
        )
    return list(range(num_wanted))


def _nearest(path: Path, info: RasterInfo, stated: Sequence[float], wanted: Sequence[float]) -> list[int]:
    """The band nearest to each wanted wavelength, at most 20 nm away, none twice."""
    positions: list[int] = []
    for nm in wanted:
        nearest = min(range(len(stated)), key=lambda i: abs(stated[i] - nm))
        if abs(stated[nearest] - nm) > WAVELENGTH_TOLERANCE_NM:
            raise ValueError(
                f"{path} holds {info.describe_bands()} but none within {WAVELENGTH_TOLERANCE_NM:.0f} nm of "
                f"{nm:g} nm, the nearest is {stated[nearest]:g} nm; change --wavelengths or leave the image out"
            )
        if nearest in positions:
            raise ValueError(
                f"{path} holds {info.describe_bands()} but both {wanted[positions.index(nearest)]:g} and {nm:g} nm "
                f"fall on its band at {stated[nearest]:g} nm; ask for fewer with --wavelengths"
            )
        positions.append(nearest)
    return positions


def _scale(
    path: Path, info: RasterInfo, positions: Sequence[int], option: float | None
) -> tuple[tuple[float, ...], tuple[float, ...], str | None]:
    scales = tuple(info.scales[i] for i in positions)
    offsets = tuple(info.offsets[i] for i in positions)
    zeros = (0.0,) * len(positions)
    if option is not None:
        return (option,) * len(positions), zeros, None
    if any(scale != 1 for scale in scales) or any(offsets):
        return scales, offsets, None
    dtype = np.dtype(info.dtype)
    if dtype.kind == "f":
        return scales, zeros, None
    if dtype.kind == "i":
        raise ValueError(
            f"{path} holds {dtype} and states no scale; give --scale, such as 0.0001 where 10000 means reflectance 1"
        )
    largest = int(np.iinfo(dtype).max)
    notice = (
        f"no scale stated: {dtype} 0..{largest} taken as 0..1; give --scale 0.0001 if values are reflectance x 10000"
    )
    return (1 / largest,) * len(positions), zeros, notice
