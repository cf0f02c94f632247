"""Measure how much a reconstruction in windows differs from one pass over the whole image, on leaf pixels.

python bench/seams.py MODEL IMAGE --tiles 256 512     (IMAGE as for msvae reconstruct, with a NAME_mask.png or nodata)
"""

import argparse
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from msvae.inference.image_bands import describe_image
from msvae.inference.load import choose_device, load_model
from msvae.inference.sliding_window import SlidingWindow
from msvae.model.autoencoder import AutoencoderKLMultispectralAdapter
from msvae.rasters.gdal import gdal_session
from msvae.rasters.images import ImageSet
from msvae.rasters.options import ReadOptions
from msvae.rasters.sources import find_sources


def reconstructed(model: AutoencoderKLMultispectralAdapter, image_set: ImageSet, tile_px: int) -> NDArray[np.float32]:
    """Return the reconstructed reflectance (C, H, W), computed in windows of `tile_px`."""
    image = image_set.images[0]
    sliding = SlidingWindow(model, image.height, image.width, tile_px, tile_px // 8, batch_size=1)
    with image_set.open(0) as opened:
        rows = sliding.rows(opened, image_set.pixel_format, range(image.width), lambda _: None)
        return np.concatenate([rows_CHW for _, rows_CHW in rows], axis=1)


def main() -> None:
    """Print the relative RMS difference for each window size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("image", type=Path)
    parser.add_argument("--tiles", type=int, nargs="+", default=[256, 512])
    arguments = parser.parse_args()
    model = load_model(arguments.model, choose_device("auto"))
    with gdal_session():
        (source,) = find_sources([arguments.image], ())
        image_set = describe_image(source, model.bands, ReadOptions(), None)
        image = image_set.images[0]
        with image_set.open(0) as opened:
            _, leaf_HW = opened.read(0, 0, image.height, image.width)
        longest_px = max(image.height, image.width)
        whole = reconstructed(model, image_set, -(-longest_px // 64) * 64)[:, leaf_HW]
        for tile_px in arguments.tiles:
            difference = reconstructed(model, image_set, tile_px)[:, leaf_HW] - whole
            relative = np.sqrt(np.mean(difference**2) / np.mean(whole**2))
            print(
                f"windows of {tile_px} px in {longest_px} px: {relative:.4f} relative RMS difference from one pass",
                flush=True,
            )


if __name__ == "__main__":
    main()
