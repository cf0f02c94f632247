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
from msvae.rasters.options import ReadOptions
from msvae.rasters.raster import STORED_DTYPES, WIDE_DTYPES, RasterInfo
from msvae.shards.reflectance import usual_scale


@dataclass(frozen=True)
class Layout:
    """How tiles are stored: reflectance = stored * scale + offset, one scale and offset a band."""

    bands: Bands
    dtype: str
    """Type of the stored values."""
    scale: tuple[float, ...]
    offset: tuple[float, ...]
    source_dtype: str
    source_scale: tuple[float, ...]
    """The same for the values in the files. Types that no stored type can hold are stored as reflectance."""
    source_offset: tuple[float, ...]
    wavelengths_stated: bool
    notices: tuple[str, ...] = ()

    def store(self, values: NDArray[Any]) -> NDArray[Any]:
        """Values (C, …) of a file in the form in which tiles hold them."""
        if self.source_dtype not in WIDE_DTYPES:
            with np.errstate(over="ignore"):
                return values.astype(self.dtype, copy=False)
        with np.errstate(over="ignore", invalid="ignore"):
            return _linear(values, self.source_scale, self.source_offset).astype(self.dtype)

    def reflectance(self, stored: NDArray[Any], bands: Sequence[int] | None = None) -> NDArray[np.float64]:
        """Reflectance in float64 of stored values (C, …): of all bands, or of those that are named."""
        chosen = range(len(self.bands)) if bands is None else bands
        return _linear(stored[list(chosen)], [self.scale[i] for i in chosen], [self.offset[i] for i in chosen])


def _linear(values: NDArray[Any], scale: Sequence[float], offset: Sequence[float]) -> NDArray[np.float64]:
    one_a_band = (-1,) + (1,) * (values.ndim - 1)
    result: NDArray[np.float64] = values * np.array(scale, np.float64).reshape(one_a_band)
    result += np.array(offset, np.float64).reshape(one_a_band)
    return result


def first_layout(path: Path, info: RasterInfo, options: ReadOptions) -> tuple[Layout, list[int]]:
    """The layout that the first image sets for all others, and which of its bands fill it.

    Raises: ValueError when bands or scale can be neither read from the image nor taken from the options.
    """
    positions, bands, notice = _first_bands(path, info, options)
    scales, offsets, scale_notice = _scale(path, info, positions, options)
    wide_notice, stored = None, (scales, offsets)
    if info.dtype in WIDE_DTYPES:
        wide_notice = f"{info.dtype} is stored as float32 reflectance, exact to 7 digits"
        stored = (1.0,) * len(bands), (0.0,) * len(bands)
    return Layout(
        bands,
        STORED_DTYPES[info.dtype],
        *stored,
        source_dtype=info.dtype,
        source_scale=scales,
        source_offset=offsets,
        wavelengths_stated=info.wavelengths_nm is not None,
        notices=tuple(line for line in (notice, scale_notice, wide_notice) if line),
    ), positions


def fit_layout(path: Path, info: RasterInfo, layout: Layout, options: ReadOptions) -> list[int]:
    """Which bands of a further image fill the layout.

    Raises: ValueError when its bands, type or scale differ.
    """
    wavelengths_nm = options.wavelengths_nm
    kinds = {np.dtype(dtype).kind for dtype in (info.dtype, layout.source_dtype)}
    if info.dtype != layout.source_dtype and kinds != {"f"}:
        raise ValueError(
            f"{path} holds {info.dtype} but the first image {layout.source_dtype}; convert one (gdal_translate -ot), "
            "or pack them as two data sets"
        )
    if wavelengths_nm is None and (info.wavelengths_nm is not None) != layout.wavelengths_stated:
        states, first = ("states", "does not") if info.wavelengths_nm else ("does not state", "does")
        raise ValueError(f"{path} {states} wavelengths but the first image {first}; give --wavelengths for all images")
    if wavelengths_nm is None and len(info.scales) != len(layout.bands):
        raise ValueError(
            f"{path} holds {info.describe_bands()} but the first image {layout.bands}; "
            "choose common bands with --wavelengths or --bands, or pack them as two data sets"
        )
    wanted = layout.bands.wavelengths_nm if wavelengths_nm is None else wavelengths_nm
    if info.wavelengths_nm:
        positions = _nearest(path, info, info.wavelengths_nm, wanted, options.tolerance_nm)
    else:
        positions = _by_name(path, info, layout.bands, in_order=wavelengths_nm is not None)
    scales, offsets, _ = _scale(path, info, positions, options)
    if (scales, offsets) != (layout.source_scale, layout.source_offset):
        raise ValueError(
            f"{path} states scale {scales} and offset {offsets} but the first image {layout.source_scale} and "
            f"{layout.source_offset}; give --scale for all images, or pack them as two data sets"
        )
    return positions


def _first_bands(path: Path, info: RasterInfo, options: ReadOptions) -> tuple[list[int], Bands, str | None]:
    num_bands, wanted = len(info.scales), options.wavelengths_nm
    everything = list(range(num_bands))
    if info.wavelengths_nm:
        stated = info.wavelengths_nm
        positions = everything if wanted is None else _nearest(path, info, stated, wanted, options.tolerance_nm)
        return positions, _named(info, positions, [stated[i] for i in positions]), None
    if wanted is not None:
        positions = _in_order(path, info, len(wanted))
        return positions, _named(info, positions, wanted), None
    bands = _assumed(info)
    if bands is None:
        raise ValueError(
            f"{path} holds {info.describe_bands()} and states no wavelengths; give --wavelengths, one in nm for "
            "every band, or --band-files if each band is a file of its own"
        )
    pairs = zip(bands.names, bands.wavelengths_nm, strict=True)
    assumed = ", ".join(f"{name} {nm:.0f}" for name, nm in pairs)
    return everything, bands, f"no wavelengths stated: assumed {assumed} nm; give --wavelengths if that is wrong"


def _assumed(info: RasterInfo) -> Bands | None:
    """Wavelengths by the names of the bands, else the defaults if there are as many bands as these."""
    roles = [re.sub(r"[^a-z]", "", name.lower()) for name in info.names or ()]
    by_role = {name.replace("_", ""): nm for name, nm in zip(DEFAULT_NAMES, DEFAULT_WAVELENGTHS_NM, strict=True)}
    if info.names and len(set(roles)) == len(roles) and set(roles) <= set(by_role):
        return Bands(tuple(by_role[role] for role in roles), info.names)
    if len(info.scales) != len(DEFAULT_NAMES):
        return None
    return replace(Bands(), names=info.names) if info.names else Bands()


def _named(info: RasterInfo, positions: Sequence[int], wavelengths_nm: Sequence[float]) -> Bands:
    if info.names is None:
        return Bands.of_wavelengths(wavelengths_nm)
    return Bands(tuple(wavelengths_nm), tuple(info.names[i] for i in positions))


def _by_name(path: Path, info: RasterInfo, bands: Bands, in_order: bool) -> list[int]:
    """The places of bands by their names; where these tell nothing and their order is known, in that order."""
    places = bands.indices_in(info.names) if info.names else None
    if places is None and info.names and not in_order:
        raise ValueError(
            f"{path} names its bands {', '.join(info.names)}, which are not those of the first image "
            f"({', '.join(bands.names)}), and states no wavelengths; give --wavelengths if the order of bands is the "
            "same in every image, or rename them"
        )
    return places or _in_order(path, info, len(bands))


def _in_order(path: Path, info: RasterInfo, num_wanted: int) -> list[int]:
    if len(info.scales) != num_wanted:
        raise ValueError(
            f"{path} holds {info.describe_bands()} and states no wavelengths, but {num_wanted} are asked for; "
            "give --wavelengths with one in nm for every band, or complete the raster"
        )
    return list(range(num_wanted))


def _nearest(
    path: Path, info: RasterInfo, stated: Sequence[float], wanted: Sequence[float], tolerance_nm: float
) -> list[int]:
    """The band nearest to each wanted wavelength, none twice."""
    positions: list[int] = []
    for nm in wanted:
        nearest = min(range(len(stated)), key=lambda i: abs(stated[i] - nm))
        if abs(stated[nearest] - nm) > tolerance_nm:
            raise ValueError(
                f"{path} holds {info.describe_bands()} but none within {tolerance_nm:g} nm of "
                f"{nm:g} nm, the nearest is {stated[nearest]:g} nm; change --wavelengths or "
                "--tolerance-nm, or leave the image out"
            )
        if nearest in positions:
            raise ValueError(
                f"{path} holds {info.describe_bands()} but both {wanted[positions.index(nearest)]:g} and {nm:g} nm "
                f"fall on its band at {stated[nearest]:g} nm; ask for fewer with --wavelengths"
            )
        positions.append(nearest)
    return positions


def _scale(
    path: Path, info: RasterInfo, positions: Sequence[int], options: ReadOptions
) -> tuple[tuple[float, ...], tuple[float, ...], str | None]:
    """Scales and offsets from the options, the file or the type, and what was assumed."""
    offsets = tuple(info.offsets[i] for i in positions)
    if options.scale is not None or options.offset is not None:
        offsets = (options.offset or 0.0,) * len(positions)
    if options.scale is not None:
        return (options.scale,) * len(positions), offsets, None
    scales = tuple(info.scales[i] for i in positions)
    dtype = np.dtype(info.dtype)
    if any(scale != 1 for scale in scales) or any(info.offsets[i] for i in positions) or dtype.kind == "f":
        return scales, offsets, None
    if dtype.kind == "i" or dtype.itemsize > 2:
        raise ValueError(f"{path} holds {dtype} and states no scale; give --scale, such as {usual_scale(info.dtype)}")
    largest = int(np.iinfo(dtype).max)
    notice = (
        f"no scale stated: {dtype} 0..{largest} taken as 0..1; give --scale if that is wrong, such as "
        f"{usual_scale(info.dtype)}"
    )
    return (1 / largest,) * len(positions), offsets, notice
