"""Match the bands of an image with the bands of a model, and find how its values become reflectance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from msvae.bands import Bands
from msvae.rasters.expression import Expression
from msvae.rasters.images import Image, ImageSet
from msvae.rasters.masks import MaskRule, stated_mask
from msvae.rasters.options import ReadOptions
from msvae.rasters.pixel_format import PixelFormat, choose_pixel_format
from msvae.rasters.raster import Raster, RasterInfo
from msvae.rasters.sources import ImageSource


def describe_image(source: ImageSource, bands: Bands, options: ReadOptions, expression: Expression | None) -> ImageSet:
    """Describe one image with the bands of a model, in the order of the model.

    Without a leaf mask, every valid pixel is leaf.

    Args:
        source: files of the image.
        bands: bands of the model.
        options: options for bands, values and masks.
        expression: parsed mask expression of the options.
    Returns: a set of one image.
    Raises: ValueError if a file cannot be read, or if bands, mask or scale do not fit.
    """
    with Raster(source, options) as raster:
        info = raster.info
        pixel_format, band_indices = _fit(source, info, bands, options)
        rule = stated_mask(raster, expression, options.mask_files)
    if expression is not None:
        expression.band_indices(pixel_format.bands)
    notices = pixel_format.notices
    if rule is None:
        valid = "finite pixel" if info.dtype.startswith("float") else "pixel"
        notices += (f"no leaf mask: every {valid} counts as leaf; give --mask, such as 'ndvi>0.3', if that is wrong",)
    image = Image(source, tuple(band_indices), rule or MaskRule(), info.height, info.width)
    return ImageSet((image,), replace(pixel_format, notices=notices), options)


def _fit(source: ImageSource, info: RasterInfo, bands: Bands, options: ReadOptions) -> tuple[PixelFormat, list[int]]:
    notices: tuple[str, ...] = ()
    if info.wavelengths_nm is None and options.wavelengths_nm is None:
        if len(info.scales) != len(bands):
            raise _misfit(source, info.describe_bands(), bands, "give --bands, or --wavelengths of all its bands")
        indices = bands.indices_in(info.names) if info.names else list(range(len(bands)))
        if indices is None:
            raise _misfit(source, info.describe_bands(), bands, "give --wavelengths of all its bands, in their order")
        wavelengths_nm = tuple(bands.wavelengths_nm[indices.index(i)] for i in range(len(bands)))
        options = options.model_copy(update={"wavelengths_nm": wavelengths_nm})
        notices = (f"no wavelengths stated: assumed those of the model, {bands}; give --wavelengths if that is wrong",)
    pixel_format, band_indices = choose_pixel_format(source.path, info, options)
    chosen = _nearest(pixel_format.bands.wavelengths_nm, bands.wavelengths_nm, options.tolerance_nm)
    if chosen is None:
        hint = "give --wavelengths, a larger --tolerance-nm, or use a model trained on these bands"
        raise _misfit(source, str(pixel_format.bands), bands, hint)
    names = tuple(pixel_format.bands.names[i] for i in chosen) if info.names else bands.names
    fitted = replace(
        pixel_format,
        bands=Bands(tuple(pixel_format.bands.wavelengths_nm[i] for i in chosen), names),
        scale=tuple(pixel_format.scale[i] for i in chosen),
        offset=tuple(pixel_format.offset[i] for i in chosen),
        source_scale=tuple(pixel_format.source_scale[i] for i in chosen),
        source_offset=tuple(pixel_format.source_offset[i] for i in chosen),
        notices=notices + pixel_format.notices,
    )
    return fitted, [band_indices[i] for i in chosen]


def _nearest(found_nm: Sequence[float], wanted_nm: Sequence[float], tolerance_nm: float) -> list[int] | None:
    """Return the index of the nearest found wavelength for each wanted one.

    Return None if one is further away than the tolerance, or if two have the same nearest wavelength.
    """
    nearest = [min(range(len(found_nm)), key=lambda i: abs(found_nm[i] - nm)) for nm in wanted_nm]
    too_far = any(abs(found_nm[i] - nm) > tolerance_nm for i, nm in zip(nearest, wanted_nm, strict=True))
    return None if too_far or len(set(nearest)) < len(nearest) else nearest


def _misfit(source: ImageSource, holds: str, bands: Bands, hint: str) -> ValueError:
    return ValueError(f"{source.path} holds {holds}, the model expects {bands}; {hint}")
