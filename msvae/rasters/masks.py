"""Leaf masks: mask files, the rule by which the mask of an image is found, and masks of one bit per pixel on disk."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import rasterio
from numpy.typing import NDArray
from rasterio.enums import ColorInterp
from rasterio.errors import RasterioError
from rasterio.windows import Window

from msvae.rasters.expression import Expression
from msvae.rasters.gdal import has_mask_band, largest_shift_px
from msvae.rasters.raster import Raster
from msvae.rasters.sources import MASK_ENDING, ImageSource, mask_paths

MASK_FILE_ENDINGS = (".png", ".tif", ".tiff")
FLOAT_MASK_THRESHOLD = 0.5
MASK_TOLERANCE_PX = 0.5
"""Largest shift between mask and image. Up to it, the nearest mask pixel has the same row and column as the pixel."""
CHECKED_ROWS = 256
MAX_SLAB_BYTES = 64 * 2**20


@dataclass(frozen=True)
class BitMask:
    """A leaf mask (H, W) in a file of one bit per pixel."""

    file: Path
    height: int
    width: int

    @classmethod
    def write(cls, file: Path, width: int, strips: Iterable[NDArray[np.bool_]]) -> BitMask:
        """Write full-width strips, from top to bottom."""
        height = 0
        with file.open("wb") as opened:
            for strip in strips:
                opened.write(np.packbits(strip, axis=1).tobytes())
                height += len(strip)
        return cls(file, height, width)

    def read(self, row: int, col: int, height: int, width: int) -> NDArray[np.bool_]:
        """Return a window (H, W)."""
        row_bytes = -(-self.width // 8)
        # The file is mapped anew for each window: pages of a map that stays open count as memory of the process.
        packed = np.memmap(self.file, np.uint8, "r", shape=(self.height, row_bytes))
        first, last = col // 8, -(-(col + width) // 8)
        bits = np.unpackbits(packed[row : row + height, first:last], axis=1)
        return bits[:, col - 8 * first : col - 8 * first + width].astype(bool)

    def remove(self) -> None:
        """Delete the file."""
        self.file.unlink()


@dataclass(frozen=True)
class MaskRule:
    """How the leaf mask of one image is found: by a file, by an expression, or else by nodata and NaN."""

    file: Path | None = None
    expression: Expression | None = None
    must_have_background: bool = False
    """Refuse the image if all its pixels are leaf, because nothing else proves that it has a mask."""
    threshold: float | None = None
    """Otsu's threshold of this image, if the expression needs one and `prepare_mask` has found it."""
    bits: BitMask | None = None
    """The finished mask, if it depends on the whole image and `prepare_mask` has made it."""


def parse_mask_option(text: str) -> Expression | None:
    """Return None for `auto`. Raises: ValueError if the text is neither `auto` nor a valid expression."""
    return None if text.strip().lower() == "auto" else Expression.parse(text)


def choose_mask(image: Raster, expression: Expression | None, mask_files: str | None) -> MaskRule:
    """Return the mask rule of one image.

    Raises: ValueError if nothing separates leaf from background, or the mask file does not fit the image.
    """
    rule = stated_mask(image, expression, mask_files)
    if rule is None and np.dtype(image.info.dtype).kind != "f":
        raise no_mask_error(image.source)
    return rule or MaskRule(must_have_background=True)


def stated_mask(image: Raster, expression: Expression | None, mask_files: str | None) -> MaskRule | None:
    """Return the mask rule that options, files or the image itself state, or None if only NaN can mark background.

    Raises: ValueError if a mask file is missing, has an unsupported type, or does not fit the image.
    """
    if expression is not None:
        return MaskRule(expression=expression)
    file = find_mask_file(image.source, mask_files)
    if file is not None:
        with MaskFile(file, image) as mask:
            mask.check_values()
        return MaskRule(file=file)
    if image.info.states_nodata:
        return MaskRule()
    # Only the option states this value. If it is mistyped, no pixel has it, and everything would count as leaf.
    return MaskRule(must_have_background=True) if image.nodata_given else None


def no_mask_error(source: ImageSource) -> ValueError:
    """Return the error for an image in which nothing separates leaf from background."""
    return ValueError(
        f"{source.path} has no leaf mask (no {source.stem}{MASK_ENDING}.png or .tif next to it, no nodata, no "
        f"mask band, no NaN); "
        "put a mask file there, or give --mask 'ndvi>0.10' or another index, or --nodata with the background value"
    )


def find_mask_file(source: ImageSource, pattern: str | None) -> Path | None:
    """Return the mask file of an image: by `pattern`, else the file next to the image, if there is one.

    Raises: ValueError if no file matches the pattern, or the file next to the image has an unsupported type.
    """
    if pattern is None:
        return _mask_next_to(source)
    paths = mask_paths(source.path, source.stem, pattern)
    for file in paths:
        if file.is_file():
            return file
    searched = " or ".join(dict.fromkeys(map(str, paths)))
    raise ValueError(
        f"{source.path} has no mask at {searched}; correct --mask-files ({{stem}} means {source.stem}), "
        "or leave the image out"
    )


class MaskFile:
    """An open mask file. Use as a context manager.

    A pixel is leaf if any plane is non-zero (above 0.5 in floats), unless nodata, transparency or a mask band hides
    it. A file with a palette is read by its colours, not by the numbers of the colours.

    Raises: ValueError if the file cannot be opened, differs from the image in size, or, if both are georeferenced,
    has another grid.
    """

    def __init__(self, file: Path, image: Raster) -> None:
        self._rows: tuple[int, int, NDArray[np.bool_]] | None = None
        try:
            self._mask = rasterio.open(file)
        except RasterioError as error:
            raise ValueError(f"mask {file} cannot be opened ({error}); make it again") from error
        try:
            self._check_grid(image)
        except ValueError:
            self._mask.close()
            raise
        self._is_alpha = np.array([meaning == ColorInterp.alpha for meaning in self._mask.colorinterp])
        self._leaf_of_palette = _leaf_of_palette(self._mask)

    def __enter__(self) -> MaskFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        self._mask.close()

    def _check_grid(self, image: Raster) -> None:
        path, height, width = image.source.path, image.info.height, image.info.width
        if self._mask.shape != (height, width):
            raise ValueError(
                f"mask {self._mask.name} has {self._mask.height} x {self._mask.width} px but {path} has "
                f"{height} x {width} px; make the mask at the size of the image"
            )
        profile = image.georeference().profile
        if "transform" not in profile or self._mask.transform.is_identity:
            return
        shift_px = largest_shift_px(profile["transform"], self._mask.transform, height, width)
        epsg, mask_epsg = (crs.to_epsg() if crs else None for crs in (profile.get("crs"), self._mask.crs))
        if shift_px > MASK_TOLERANCE_PX or (epsg and mask_epsg and epsg != mask_epsg):
            raise ValueError(
                f"mask {self._mask.name} is on another grid than {path} (off by {shift_px:.2f} px, EPSG:{mask_epsg} "
                f"and EPSG:{epsg}); resample it to the grid of the image (rio warp MASK OUT --like IMAGE)"
            )

    def check_values(self) -> None:
        """Check that palette and nodata of the mask cannot be misread. This may read the whole file.

        Raises: ValueError if a palette is ambiguous, or the mask is 0 or nodata everywhere.
        """
        if self._leaf_of_palette is not None:
            self._check_palette(self._leaf_of_palette)
        self._check_nodata()

    def _check_palette(self, is_leaf: NDArray[np.bool_]) -> None:
        """Check that a palette cannot be misread. A palette of greys is read by its colours.

        In a palette with other colours, the number 0 and no other must be background. Otherwise a map with a white 0
        for soil and a green 1 for leaf would be read as leaf everywhere.
        """
        height, width = self._mask.shape
        used: set[int] = set()
        for row in range(0, height, CHECKED_ROWS):
            used.update(np.unique(self._read_planes(row, 0, min(CHECKED_ROWS, height - row), width)).tolist())
        colours = {number: self._mask.colormap(1)[number][:3] for number in sorted(used)}
        if all(len(set(colour)) == 1 for colour in colours.values()):
            return
        for number, colour in colours.items():
            if bool(is_leaf[number]) != (number > 0):
                raise ValueError(
                    f"mask {self._mask.name} has a palette in which {number} has the colour {colour}, so it is "
                    "unclear whether that is leaf; save the mask as black and white without a palette"
                )

    def _check_nodata(self) -> None:
        """Check that nodata does not hide the whole leaf. gdal_calc sets nodata to 255, also if 255 means leaf."""
        nodata = next(filter(None, self._mask.nodatavals), None)
        if nodata is None:
            return
        height, width = self._mask.shape
        has_zeros = False
        for row in range(0, height, CHECKED_ROWS):
            rows = min(CHECKED_ROWS, height - row)
            if self._decode(row, 0, rows, width).any():
                return
            has_zeros = has_zeros or bool((self._read_planes(row, 0, rows, width) == 0).any())
        if has_zeros:
            raise ValueError(
                f"mask {self._mask.name} is 0 or its nodata value {nodata:g} everywhere, so it has no leaf pixel; if "
                "that value means leaf, unset it as nodata (rio edit-info --unset-nodata MASK)"
            )

    def read(self, row: int, col: int, height: int, width: int) -> NDArray[np.bool_]:
        """Return the leaf mask (H, W) of a window.

        Whole rows are kept for the next window, because a PNG can only be decoded from its top.

        Raises: ValueError if the file is damaged.
        """
        if height * self._mask.width * self._mask.count > MAX_SLAB_BYTES:
            return self._decode(row, col, height, width)
        if self._rows is None or self._rows[:2] != (row, height):
            self._rows = (row, height, self._decode(row, 0, height, self._mask.width))
        return self._rows[2][:, col : col + width]

    def _decode(self, row: int, col: int, height: int, width: int) -> NDArray[np.bool_]:
        values_CHW = self._read_planes(row, col, height, width)
        if self._leaf_of_palette is not None:
            set_CHW = self._leaf_of_palette[values_CHW]
        else:
            set_CHW = values_CHW > (FLOAT_MASK_THRESHOLD if values_CHW.dtype.kind == "f" else 0)
        for plane, nodata in enumerate(self._mask.nodatavals):
            if nodata is not None and not self._is_alpha[plane]:
                set_CHW[plane] &= values_CHW[plane] != nodata
        leaf_HW: NDArray[np.bool_] = set_CHW[~self._is_alpha].any(axis=0) & set_CHW[self._is_alpha].all(axis=0)
        if has_mask_band(self._mask):
            with _name_damage(self._mask, row):
                leaf_HW &= self._mask.read_masks(1, window=Window(col, row, width, height)) > 0
        return leaf_HW

    def _read_planes(self, row: int, col: int, height: int, width: int) -> NDArray[Any]:
        with _name_damage(self._mask, row):
            values_CHW: NDArray[Any] = self._mask.read(window=Window(col, row, width, height))
        return values_CHW


def _mask_next_to(source: ImageSource) -> Path | None:
    for ending in MASK_FILE_ENDINGS:
        for file in source.masks:
            if file.suffix.lower() == ending:
                return file
    if source.masks:
        names = ", ".join(file.name for file in source.masks)
        raise ValueError(
            f"{source.path} has {names} next to it, expected a mask that ends in {', '.join(MASK_FILE_ENDINGS)}; "
            "save it as one of these, or rename it if it is not a mask"
        )
    return None


def _leaf_of_palette(mask: Any) -> NDArray[np.bool_] | None:
    """Return for each number of a palette if its colour is neither black nor transparent; None without a palette."""
    if mask.colorinterp[0] != ColorInterp.palette:
        return None
    is_leaf = np.zeros(np.iinfo(mask.dtypes[0]).max + 1, bool)
    for number, (*colour, alpha) in mask.colormap(1).items():
        is_leaf[number] = any(colour) and alpha > 0
    return is_leaf


@contextmanager
def _name_damage(mask: Any, row: int) -> Iterator[None]:
    """Turn an error of GDAL into a ValueError that names the mask file."""
    try:
        yield
    except RasterioError as error:
        raise ValueError(
            f"mask {mask.name} cannot be read at row {row} ({error.__cause__ or error}); "
            "it is truncated or damaged, make it again"
        ) from error
