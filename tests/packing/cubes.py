"""A small cube of five bands, and a function that packs one image."""

from __future__ import annotations

import numpy as np
from PIL import Image

from msvae.packing.options import PackOptions
from msvae.packing.pack import pack

FIVE_NM = (475.0, 560.0, 668.0, 717.0, 840.0)
WHOLE = {"tile_px": 32, "split": (1, 0, 0), "min_coverage": 0.0}
EVERYWHERE = np.ones((48, 32), bool)
TOP = np.s_[:, :32]
"""The only tile of 32 px in an image of 48 x 32: its top."""


def cube(dtype="uint16", highest=10_000):
    values = np.random.default_rng(5).integers(1, highest, (5, 48, 32))
    return (values / highest).astype(dtype) if np.dtype(dtype).kind == "f" else values.astype(dtype)


def packed(image, out, read_tars, **options):
    summary = pack([image], out, PackOptions(**(WHOLE | options)))
    (sample,) = read_tars(out / "train").values()
    return sample["bands.npy"], sample["mask.png"], summary


def save_array(path, values, mask=EVERYWHERE):
    np.save(path, values)
    if mask is not None:
        Image.fromarray(mask).save(path.with_name(f"{path.stem}_mask.png"))
    return path
