"""The pixel format that all images of a dataset share: bands in one order, one stored type, one scale per band."""

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
class PixelFormat:
    """How pixels are stored: reflectance = stored * scale + offset, with one scale and offset per band."""

    bands: Bands
    dtype: str
    """Type of the stored values."""
    scale: tuple[float, ...]
    offset: tuple[float, ...]
    source_dtype: str
    source_scale: tuple[float, ...]
    """Scale of the values in the files. It differs from `scale` for types that are stored as reflectance."""
    source_offset: tuple[float, ...]
    wavelengths_stated: bool
    notices: tuple[str, ...] = ()

    def store(self, values: NDArray[Any]) -> NDArray[Any]:
        """Return values (C, …) of a file in the stored type."""
        if self.source_dtype not in WIDE_DTYPES:
            with np.errstate(over="ignore"):
                return values.astype(self.dtype, copy=False)
        with np.errstate(over="ignore", invalid="ignore"):
            return _linear(values, self.source_scale, self.source_offset).astype(self.dtype)

    def reflectance(self, stored: NDArray[Any], bands: Sequence[int] | None = None) -> NDArray[np.float64]:
        """Return reflectance in float64 of stored values (C, …), of all bands or of the given band indices."""
        chosen = range(len(self.bands)) if bands is None else bands
        return _linear(stored[list(chosen)], [self.scale[i] for i in chosen], [self.offset[i] for i in chosen])


def _linear(values: NDArray[Any], scale: Sequence[float], offset: Sequence[float]) -> NDArray[np.float64]:
    per_band = (-1,) + (1,) * (values.ndim - 1)
    result: NDArray[np.float64] = values * np.array(scale, np.float64).reshape(per_band)
    result += np.array(offset, np.float64).reshape(per_band)
    return result


def choose_pixel_format(path: Path, info: RasterInfo, options: ReadOptions) -> tuple[PixelFormat, list[int]]:
    """Return the pixel format that the first image sets for all others, and the indices of its bands in their order.

    Raises: ValueError if bands or scale are stated neither by the image nor by the options.
    """
    band_indices, bands, notice = _first_bands(path, info, options)
    scales, offsets, scale_notice = _scale(path, info, band_indices, options)
    wide_notice, stored = None, (scales, offsets)
    if info.dtype in WIDE_DTYPES:
        wide_notice = f"{info.dtype} is stored as float32 reflectance, exact to 7 digits"
        stored = (1.0,) * len(bands), (0.0,) * len(bands)
    return PixelFormat(
        bands,
        STORED_DTYPES[info.dtype],
        *stored,
        source_dtype=info.dtype,
        source_scale=scales,
        source_offset=offsets,
        wavelengths_stated=info.wavelengths_nm is not None,
        notices=tuple(line for line in (notice, scale_notice, wide_notice) if line),
    ), band_indices


def match_pixel_format(path: Path, info: RasterInfo, pixel_format: PixelFormat, options: ReadOptions) -> list[int]:
    """Return the indices of the bands of a further image, in the order of the pixel format.

    Raises: ValueError if its bands, type or scale differ.
    """
    wavelengths_nm = options.wavelengths_nm
    kinds = {np.dtype(dtype).kind for dtype in (info.dtype, pixel_format.source_dtype)}
    if info.dtype != pixel_format.source_dtype and kinds != {"f"}:
        raise ValueError(
            f"{path} holds {info.dtype} but the first image {pixel_format.source_dtype}; convert one "
            "(gdal_translate -ot), or pack them as two datasets"
        )
    if wavelengths_nm is None and (info.wavelengths_nm is not None) != pixel_format.wavelengths_stated:
        states, first = ("states", "does not") if info.wavelengths_nm else ("does not state", "does")
        raise ValueError(f"{path} {states} wavelengths but the first image {first}; give --wavelengths for all images")
    if wavelengths_nm is None and len(info.scales) != len(pixel_format.bands):
        raise ValueError(
            f"{path} holds {info.describe_bands()} but the first image {pixel_format.bands}; "
            "choose common bands with --wavelengths or --bands, or pack them as two datasets"
        )
    wanted = pixel_format.bands.wavelengths_nm if wavelengths_nm is None else wavelengths_nm
    if info.wavelengths_nm:
        band_indices = _nearest(path, info, info.wavelengths_nm, wanted, options.tolerance_nm)
    else:
        band_indices = _by_name(path, info, pixel_format.bands, in_order=wavelengths_nm is not None)
    scales, offsets, _ = _scale(path, info, band_indices, options)
    if (scales, offsets) != (pixel_format.source_scale, pixel_format.source_offset):
        raise ValueError(
            f"{path} states scale {scales} and offset {offsets} but the first image {pixel_format.source_scale} and "
            f"{pixel_format.source_offset}; give --scale for all images, or pack them as two datasets"
        )
    return band_indices


def _first_bands(path: Path, info: RasterInfo, options: ReadOptions) -> tuple[list[int], Bands, str | None]:
    num_bands, wanted = len(info.scales), options.wavelengths_nm
    everything = list(range(num_bands))
    if info.wavelengths_nm:
        stated = info.wavelengths_nm
        band_indices = everything if wanted is None else _nearest(path, info, stated, wanted, options.tolerance_nm)
        return band_indices, _named(info, band_indices, [stated[i] for i in band_indices]), None
    if wanted is not None:
        band_indices = _in_order(path, info, len(wanted))
        return band_indices, _named(info, band_indices, wanted), None
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
    """Return wavelengths by the band names, else the default bands if their number is equal, else None."""
    roles = [re.sub(r"[^a-z]", "", name.lower()) for name in info.names or ()]
    by_role = {name.replace("_", ""): nm for name, nm in zip(DEFAULT_NAMES, DEFAULT_WAVELENGTHS_NM, strict=True)}
    if info.names and len(set(roles)) == len(roles) and set(roles) <= set(by_role):
        return Bands(tuple(by_role[role] for role in roles), info.names)
    if len(info.scales) != len(DEFAULT_NAMES):
        return None
    return replace(Bands(), names=info.names) if info.names else Bands()


def _named(info: RasterInfo, band_indices: Sequence[int], wavelengths_nm: Sequence[float]) -> Bands:
    if info.names is None:
        return Bands.of_wavelengths(wavelengths_nm)
    return Bands(tuple(wavelengths_nm), tuple(info.names[i] for i in band_indices))


def _by_name(path: Path, info: RasterInfo, bands: Bands, in_order: bool) -> list[int]:
    """Return band indices by the names of the bands, or, without matching names, in order if that is confirmed.

    `in_order` is True if `--wavelengths` confirms that all files share one band order.
    """
    band_indices = bands.indices_in(info.names) if info.names else None
    if band_indices is None and info.names and not in_order:
        raise ValueError(
            f"{path} names its bands {', '.join(info.names)}, which are not those of the first image "
            f"({', '.join(bands.names)}), and states no wavelengths; give --wavelengths if the order of bands is the "
            "same in every image, or rename them"
        )
    return band_indices or _in_order(path, info, len(bands))


def _in_order(path: Path, info: RasterInfo, num_wanted: int) -> list[int]:
    if len(info.scales) != num_wanted:
        raise ValueError(
            f"{path} holds {info.describe_bands()} and states no wavelengths, but {num_wanted} bands are needed; "
            "give --wavelengths with one in nm for every band, or complete the raster"
        )
    return list(range(num_wanted))


def _nearest(
    path: Path, info: RasterInfo, stated: Sequence[float], wanted: Sequence[float], tolerance_nm: float
) -> list[int]:
    """Return the index of the band nearest to each wanted wavelength.

    Raises: ValueError if the nearest band is too far, or nearest to two wavelengths.
    """
    band_indices: list[int] = []
    for nm in wanted:
        nearest = min(range(len(stated)), key=lambda i: abs(stated[i] - nm))
        if abs(stated[nearest] - nm) > tolerance_nm:
            raise ValueError(
                f"{path} holds {info.describe_bands()} but none within {tolerance_nm:g} nm of "
                f"{nm:g} nm, the nearest is {stated[nearest]:g} nm; change --wavelengths or "
                "--tolerance-nm, or leave the image out"
            )
        if nearest in band_indices:
            raise ValueError(
                f"{path} holds {info.describe_bands()} but both {wanted[band_indices.index(nearest)]:g} and {nm:g} nm "
                f"are nearest to its band at {stated[nearest]:g} nm; give fewer --wavelengths"
            )
        band_indices.append(nearest)
    return band_indices


def _scale(
    path: Path, info: RasterInfo, band_indices: Sequence[int], options: ReadOptions
) -> tuple[tuple[float, ...], tuple[float, ...], str | None]:
    """Return scales and offsets from the options, the file or the type, and a notice if they were assumed."""
    offsets = tuple(info.offsets[i] for i in band_indices)
    if options.scale is not None or options.offset is not None:
        offsets = (options.offset or 0.0,) * len(band_indices)
    if options.scale is not None:
        return (options.scale,) * len(band_indices), offsets, None
    scales = tuple(info.scales[i] for i in band_indices)
    dtype = np.dtype(info.dtype)
    if any(scale != 1 for scale in scales) or any(info.offsets[i] for i in band_indices) or dtype.kind == "f":
        return scales, offsets, None
    if dtype.kind == "i" or dtype.itemsize > 2:
        raise ValueError(f"{path} holds {dtype} and states no scale; give --scale, such as {usual_scale(info.dtype)}")
    largest = int(np.iinfo(dtype).max)
    notice = (
        f"no scale stated: {dtype} 0..{largest} taken as 0..1; give --scale if that is wrong, such as "
        f"{usual_scale(info.dtype)}"
    )
    return (1 / largest,) * len(band_indices), offsets, notice
