"""Options of reading raster files and their leaf masks."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from msvae.messages import counted
from msvae.options import CliOption, Options
from msvae.shards.reflectance import check_offset, check_scale


def _words(value: Any) -> Any:
    """Split text at commas."""
    return tuple(filter(None, (word.strip() for word in value.split(",")))) if isinstance(value, str) else value


def _numbers(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return tuple(float(part) for part in value.split(",")) if value else None
    except ValueError:
        raise ValueError("expected numbers such as 475,560,668") from None


def _axes(value: Any) -> Any:
    value = (value.strip().lower() or None) if isinstance(value, str) else value
    if value is not None and sorted(value) != ["c", "h", "w"]:
        raise ValueError("expected the letters c, h and w in an order such as hwc")
    return value


def _different(bands: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(bands)) < len(bands):
        raise ValueError("expected different bands")
    return bands


def _distinct_wavelengths(values_nm: tuple[float, ...] | None) -> tuple[float, ...] | None:
    if values_nm is not None and (
        not values_nm or len(set(values_nm)) < len(values_nm) or not all(100 <= nm < 20_000 for nm in values_nm)
    ):
        raise ValueError("expected a distinct wavelength in nm for every band, such as 475,560,668,717,840")
    return values_nm


class ReadOptions(Options):
    """How image files become reflectance and leaf masks.

    Raises: ValueError, in one line, if a value is invalid.
    """

    band_files: Annotated[tuple[str, ...], BeforeValidator(_words), CliOption("Input", metavar="NAMES")] = ()
    """Names of the one-band files that make up an image: blue.tif,green.tif,…; each IMAGE is then a folder."""
    axes: Annotated[str | None, BeforeValidator(_axes), CliOption("Input", metavar="ORDER")] = None
    """Order of bands, rows and columns in the files, if bands are not first: hwc, hcw."""
    nodata: Annotated[float | None, CliOption("Input")] = None
    """Nodata value, instead of the one that the files state."""
    bands: Annotated[
        tuple[str, ...], BeforeValidator(_words), AfterValidator(_different), CliOption("Bands", metavar="NAMES")
    ] = ()
    """Bands to read, by number or name: 1,2,5 or blue,red,nir."""
    wavelengths_nm: Annotated[
        tuple[float, ...] | None,
        BeforeValidator(_numbers),
        AfterValidator(_distinct_wavelengths),
        CliOption("Bands", "--wavelengths", metavar="NM,…"),
    ] = None
    """Bands to read, by wavelength in nm: 475,560,668; or the wavelengths of all bands if the files state none."""
    tolerance_nm: Annotated[float, Field(ge=0, allow_inf_nan=False), CliOption("Bands")] = 20.0
    """Largest difference between a requested wavelength and that of its band, in nm."""
    scale: Annotated[float | None, CliOption("Bands")] = None
    """Scale in reflectance = value x scale + offset, instead of the file's scale: 0.0001."""
    offset: Annotated[float | None, CliOption("Bands")] = None
    """Reflectance of the value 0, instead of the file's offset: -0.1."""
    mask: Annotated[str, CliOption("Mask")] = "auto"
    """auto (NAME_mask file, else nodata, NaN or a mask band), 'ndvi>0.3', or 'otsu(ndvi) and green<0.4'."""
    mask_files: Annotated[
        str | None, BeforeValidator(lambda text: text or None), CliOption("Mask", metavar="PATTERN")
    ] = None
    """Path of masks, relative to the image or the current folder: 'masks/{stem}.tif'."""
    min_object_px: Annotated[int, Field(ge=0), CliOption("Mask")] = 0
    """Remove leaf objects (connected by sides) of fewer pixels."""
    erode_px: Annotated[int, Field(ge=0), CliOption("Mask")] = 0
    """Erode leaf borders by this many pixels, after small objects are removed."""

    @model_validator(mode="after")
    def _check_reading(self) -> ReadOptions:
        if self.scale is not None:
            check_scale([self.scale])
        if self.offset is not None:
            check_offset([self.offset])
        if self.axes not in (None, "chw") and self.band_files:
            raise ValueError(
                f"got --axes {self.axes} with --band-files, whose files hold one band each; give one of them"
            )
        if self.mask_files is not None and self.mask.strip().lower() != "auto":
            raise ValueError(f"got --mask {self.mask} and --mask-files {self.mask_files}; give one of them")
        wavelengths_nm = self.wavelengths_nm
        if self.band_files and wavelengths_nm is not None and len(self.band_files) != len(wavelengths_nm):
            raise ValueError(
                f"got {counted(len(self.band_files), 'band file')} but {counted(len(wavelengths_nm), 'wavelength')}; "
                "give one wavelength for every band file"
            )
        return self
