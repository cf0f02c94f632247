"""All images of a data set and what they have in common, found before a pixel is read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from msvae.packing.options import PackOptions
from msvae.rasters.expression import Expression
from msvae.rasters.masks import MaskedImage, MaskRule, choose_mask
from msvae.rasters.pixel_format import Layout, first_layout, fit_layout
from msvae.rasters.raster import Raster
from msvae.rasters.sources import ImageSource


@dataclass(frozen=True)
class Image:
    """An image that fits the data set: which of its bands are taken and how its leaf mask is found."""

    source: ImageSource
    positions: tuple[int, ...]
    mask: MaskRule
    height: int
    width: int


@dataclass(frozen=True)
class DataSet:
    """All images and what they have in common."""

    images: tuple[Image, ...]
    layout: Layout
    options: PackOptions

    def open(self, index: int, mask: MaskRule | None = None) -> MaskedImage:
        """One image with its leaf mask, or with another."""
        image = self.images[index]
        return MaskedImage(image.source, image.positions, mask or image.mask, self.layout, self.options)

    def input_files(self) -> Iterator[Path]:
        """Every file that decides what is packed."""
        for image in self.images:
            beside = [Path(f"{file}.aux.xml") for file in image.source.files]
            beside += [file.with_suffix(".hdr") for file in image.source.files]
            yield from image.source.files
            yield from (file for file in beside if file.is_file() and file not in image.source.files)
            if image.mask.file is not None:
                yield image.mask.file


def describe_images(sources: Sequence[ImageSource], options: PackOptions, expression: Expression | None) -> DataSet:
    """Open every image once and see that they fit together, before a pixel is read."""
    layout, images = None, []
    for source in sources:
        with Raster(source, options) as raster:
            info = raster.info
            if layout is None:
                layout, positions = first_layout(source.path, info, options)
                if expression is not None:
                    expression.band_indices(layout.bands)
            else:
                positions = fit_layout(source.path, info, layout, options)
            rule = choose_mask(raster, expression, options.mask_files)
        images.append(Image(source, tuple(positions), rule, info.height, info.width))
    assert layout is not None
    return DataSet(tuple(images), layout, options)
