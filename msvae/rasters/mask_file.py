"""A leaf mask in a file of its own."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

import numpy as np
import rasterio
from numpy.typing import NDArray
from rasterio.enums import ColorInterp
from rasterio.errors import RasterioError
from rasterio.windows import Window

from msvae.rasters.gdal import has_mask_band, largest_shift_px
from msvae.rasters.raster import Raster
from msvae.rasters.sources import ImageSource, mask_paths

MASK_FILE_ENDINGS = (".png", ".tif", ".tiff")
FLOAT_MASK_THRESHOLD = 0.5
MASK_TOLERANCE_PX = 0.5
"""Up to that, the pixel of the mask that lies nearest is the one at the same row and column."""
CHECKED_ROWS = 256
MAX_SLAB_BYTES = 64 * 2**20


def find_mask_file(source: ImageSource, pattern: str | None) -> Path | None:
    """The mask of an image by `pattern`; without a pattern beside it, where there may be none.

    Raises: ValueError when the pattern leads to no file, or what lies beside the image is of another kind.
    """
    if pattern is None:
        return _mask_beside(source)
    places = mask_paths(source.path, source.stem, pattern)
    for file in places:
        if file.is_file():
            return file
    looked = " or ".join(dict.fromkeys(map(str, places)))
    raise ValueError(
        f"{source.path} has no mask at {looked}; correct --mask-files ({{stem}} stands for {source.stem}), "
        "or leave the image out"
    )


def _mask_beside(source: ImageSource) -> Path | None:
    for ending in MASK_FILE_ENDINGS:
        for file in source.masks:
            if file.suffix.lower() == ending:
                return file
    if source.masks:
        names = ", ".join(file.name for file in source.masks)
        raise ValueError(
            f"{source.path} has {names} beside it, expected a mask that ends in {', '.join(MASK_FILE_ENDINGS)}; "
            "save it as one of these, or rename what is no mask"
        )
    return None


class MaskFile:
    """An open mask: leaf where any plane is set, unless nodata, transparency or a mask band hides it.

    Use as a context manager.

    Raises: ValueError when the file cannot be opened.
    """

    def __init__(self, file: Path) -> None:
        self._rows: tuple[int, int, NDArray[np.bool_]] | None = None
        try:
            self._mask = rasterio.open(file)
        except RasterioError as error:
            raise ValueError(f"mask {file} cannot be opened ({error}); make it again") from error
        # masks are also painted in colour
        self._is_alpha = np.array([meaning == ColorInterp.alpha for meaning in self._mask.colorinterp])

    def __enter__(self) -> MaskFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        self._mask.close()

    def check(self, image: Raster) -> None:
        """Raises: ValueError when mask and image differ in size, or both are georeferenced and lie elsewhere, or all
        that the mask sets is its nodata.
        """
        path, height, width = image.source.path, image.info.height, image.info.width
        if self._mask.shape != (height, width):
            raise ValueError(
                f"mask {self._mask.name} has {self._mask.height} x {self._mask.width} px but {path} has "
                f"{height} x {width} px; make the mask at the size of the image"
            )
        self._check_nodata()
        place = image.georeference().profile
        if "transform" not in place or self._mask.transform.is_identity:
            return
        shift_px = largest_shift_px(place["transform"], self._mask.transform, height, width)
        epsg, mask_epsg = (crs.to_epsg() if crs else None for crs in (place.get("crs"), self._mask.crs))
        if shift_px > MASK_TOLERANCE_PX or (epsg and mask_epsg and epsg != mask_epsg):
            raise ValueError(
                f"mask {self._mask.name} lies on another grid than {path} (off by {shift_px:.2f} px, EPSG:{mask_epsg} "
                f"and EPSG:{epsg}); bring it to that of the image (rio warp MASK OUT --like IMAGE)"
            )

    def _check_nodata(self) -> None:
        """gdal_calc states 255 as nodata also of masks that are 255 on the leaf."""
        nodata = next(filter(None, self._mask.nodatavals), None)
        if nodata is None:
            return
        height, width = self._mask.shape
        has_zeros = False
        for row in range(0, height, CHECKED_ROWS):
            rows = min(CHECKED_ROWS, height - row)
            if self._decode(row, 0, rows, width).any():
                return
            has_zeros = has_zeros or bool((self._mask.read(window=Window(0, row, width, rows)) == 0).any())
        if has_zeros:
            raise ValueError(
                f"mask {self._mask.name} is 0 or its nodata value {nodata:g} everywhere, so nothing in it is leaf; if "
                "that value means leaf, unset it as nodata (rio edit-info --unset-nodata MASK)"
            )

    def read(self, row: int, col: int, height: int, width: int) -> NDArray[np.bool_]:
        """Leaf in a window (H, W). Whole rows are kept: a PNG can only be decoded from its top.

        Raises: ValueError when the file is damaged.
        """
        if height * self._mask.width * self._mask.count > MAX_SLAB_BYTES:
            return self._decode(row, col, height, width)
        if self._rows is None or self._rows[:2] != (row, height):
            self._rows = (row, height, self._decode(row, 0, height, self._mask.width))
        return self._rows[2][:, col : col + width]

    def _decode(self, row: int, col: int, height: int, width: int) -> NDArray[np.bool_]:
        window = Window(col, row, width, height)
        try:
            values_CHW = self._mask.read(window=window)
            shown_HW = self._mask.read_masks(1, window=window) > 0 if has_mask_band(self._mask) else True
        except RasterioError as error:
            raise ValueError(
                f"mask {self._mask.name} cannot be read at row {row} ({error.__cause__ or error}); "
                "it is truncated or damaged, make it again"
            ) from error
        set_CHW = values_CHW > (FLOAT_MASK_THRESHOLD if values_CHW.dtype.kind == "f" else 0)
        for plane, nodata in enumerate(self._mask.nodatavals):
            if nodata is not None and not self._is_alpha[plane]:
                set_CHW[plane] &= values_CHW[plane] != nodata
        leaf_HW: NDArray[np.bool_] = set_CHW[~self._is_alpha].any(axis=0) & set_CHW[self._is_alpha].all(axis=0)
        return leaf_HW & shown_HW
