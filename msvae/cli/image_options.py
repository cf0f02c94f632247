"""Options of every command that reads images: what they hold, and where their leaves are."""

from __future__ import annotations

from typing import Annotated, Any

import typer


def option(panel: str, text: str, *names: str, **settings: Any) -> Any:
    """An option that stands in a panel of the help."""
    return typer.Option(*names, help=text, rich_help_panel=panel, **settings)


BandFiles = Annotated[
    str, option("Input", "One-band files that make up an image: blue.tif,green.tif,…; each IMAGE is a folder then.")
]
Axes = Annotated[str, option("Input", "Where bands do not come first: hwc, hcw.", metavar="ORDER")]
Nodata = Annotated[float | None, option("Input", "Value that means no data, instead of the file's.")]
BandNames = Annotated[str, option("Bands", "Bands to take, by number or name: 1,2,5 or blue,red,nir.")]
ToleranceNm = Annotated[float, option("Bands", "How far a band may be from its wavelength.")]
Scale = Annotated[
    float | None, option("Bands", "Reflectance = value x scale + offset, instead of the file's: 0.0001.")
]
Offset = Annotated[float | None, option("Bands", "Reflectance of the value 0: -0.1.")]
Mask = Annotated[
    str,
    option(
        "Mask", "auto (NAME_mask file, else nodata, NaN or a mask band), 'ndvi>0.3', or 'otsu(ndvi) and green<0.4'."
    ),
]
MaskFiles = Annotated[str, option("Mask", "Where masks lie: 'masks/{stem}.tif'.", metavar="PATTERN")]
MinObjectPx = Annotated[int, option("Mask", "Drop connected leaf objects of fewer pixels.")]
ErodePx = Annotated[int, option("Mask", "Move leaf borders inwards, after that.")]
