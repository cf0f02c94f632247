"""Random tiles and leaf masks, and their leaf pixels in float64 for references."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import strategies as st

masks = st.sampled_from(["empty", "full", "one pixel", "one band", "random"])
dtypes = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16])
sides = st.tuples(st.sampled_from([8, 16, 24]), st.sampled_from([8, 16, 40]))


def random_tiles(
    seed: int,
    bands: int,
    mask: str,
    side: tuple[int, int] = (8, 16),
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return reconstruction and target (2, C, H, W) and leaf mask (2, 1|C, H, W).

    In the mask "one band", band 0 is missing at some pixels.
    """
    generator = torch.Generator().manual_seed(seed)
    recon, target = ((torch.rand(2, bands, *side, generator=generator) + 0.05).to(dtype) for _ in range(2))
    leaf = torch.zeros(2, 1, *side, dtype=torch.bool)
    if mask == "full":
        leaf[:] = True
    elif mask == "one pixel":
        leaf[1, 0, 3, 5] = True
    elif mask == "random":
        leaf = torch.rand(2, 1, *side, generator=generator) > 0.6
    elif mask == "one band":
        leaf = torch.ones(2, bands, *side, dtype=torch.bool)
        leaf[:, 0] = torch.rand(2, *side, generator=generator) > 0.5
    return recon, target, leaf


def band_values(image: torch.Tensor, leaf: torch.Tensor, band: int) -> np.ndarray:
    """Return the leaf values of one band in float64."""
    return image[:, band][leaf.expand_as(image)[:, band]].double().numpy()


def leaf_spectra(image: torch.Tensor, leaf: torch.Tensor) -> np.ndarray:
    """Return the spectra of pixels that are leaf in every band, (pixels, bands) float64."""
    array, chosen = image.double().numpy(), leaf.all(dim=1).numpy()
    return np.array([array[b, :, y, x] for b, y, x in zip(*np.nonzero(chosen), strict=True)]).reshape(
        -1, array.shape[1]
    )


def tolerance(dtype: torch.dtype) -> float:
    """Return the relative tolerance: losses are computed in float32, or in float64 for float64 tiles."""
    return 1e-10 if dtype == torch.float64 else 2e-5
