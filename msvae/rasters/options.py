"""How raster files and their leaf masks are read."""

from __future__ import annotations

import math
from dataclasses import dataclass

from msvae.messages import counted
from msvae.shards.reflectance import check_offset, check_scale


@dataclass(frozen=True)
class ReadOptions:
    """How image files become reflectance and leaf masks.

    Raises: ValueError for an invalid value.
    """

    band_files: tuple[str, ...] = ()
    """Names of one-band files; each IMAGE is then a folder that holds all of them."""
    axes: str | None = None
    """Order in which the files keep bands (c), rows (h) and columns (w), such as `hwc`; None is `chw`, or an error
    where that looks wrong."""
    nodata: float | None = None
    """Value that means no data; None takes what the rasters state."""
    bands: tuple[str, ...] = ()
    """Bands to take, in this order, by number from 1 or by name; empty takes all."""
    wavelengths_nm: tuple[float, ...] | None = None
    """Bands to take, in this order, by the wavelength that the rasters state, or where they state none, the
    wavelengths of all bands; None takes all."""
    tolerance_nm: float = 20.0
    """How far the stated wavelength of a band may be from the wanted one."""
    scale: float | None = None
    """Reflectance of a difference of 1 in value; None takes what the rasters state."""
    offset: float | None = None
    """Reflectance of the value 0; None takes what the rasters state, or 0 where `scale` is given."""
    mask: str = "auto"
    """`auto` (mask file, else nodata, NaN or a mask band), or a condition such as `ndvi>0.10` or `otsu(ndvi)`."""
    mask_files: str | None = None
    """Pattern of mask files, seen from the folder of an image or from here, such as `masks/{stem}.tif`; None is
    `{stem}_mask` with any usual ending."""
    min_object_px: int = 0
    """Connected leaf objects (by sides) of fewer pixels are background."""
    erode_px: int = 0
    """How many pixels the leaf border moves inwards, after small objects are gone."""

    def __post_init__(self) -> None:
        if self.scale is not None:
            check_scale([self.scale])
        self._check_inputs()
        self._check_wavelengths()
        self._check_mask()

    def _check_inputs(self) -> None:
        if self.axes is not None and sorted(self.axes) != ["c", "h", "w"]:
            raise ValueError(f"got --axes {self.axes}, expected the letters c, h and w in an order such as hwc")
        if self.axes not in (None, "chw") and self.band_files:
            raise ValueError(f"got --axes {self.axes} with --band-files, whose files hold one band each; give one")
        if len(set(self.bands)) < len(self.bands):
            raise ValueError(f"got --bands {','.join(self.bands)}, expected different bands")
        if self.offset is not None:
            check_offset([self.offset])

    def _check_mask(self) -> None:
        if self.mask_files is not None and self.mask.strip().lower() != "auto":
            raise ValueError(f"got --mask {self.mask} and --mask-files {self.mask_files}; give one of them")
        for option, value in (("--min-object-px", self.min_object_px), ("--erode-px", self.erode_px)):
            if value < 0:
                raise ValueError(f"got {option} {value}, expected 0 or more")

    def _check_wavelengths(self) -> None:
        wanted = self.wavelengths_nm
        if not (math.isfinite(self.tolerance_nm) and self.tolerance_nm >= 0):
            raise ValueError(f"got --tolerance-nm {self.tolerance_nm}, expected 0 or more")
        if wanted is None:
            return
        if not wanted or len(set(wanted)) < len(wanted) or not all(100 <= nm < 20_000 for nm in wanted):
            raise ValueError(
                f"got --wavelengths {', '.join(f'{nm:g}' for nm in wanted) or '(none)'}, expected one different "
                "wavelength in nm for every band, such as 475,560,668,717,840"
            )
        if self.band_files and len(self.band_files) != len(wanted):
            raise ValueError(
                f"got {counted(len(self.band_files), 'band file')} but {counted(len(wanted), 'wavelength')}; "
                "give one wavelength for every band file"
            )
