"""Check that the losses of the multispectral VAE are computed on leaf pixels only.

python examples/multispectral/test_masked_loss.py

The script needs no data, no download and no GPU, and it takes a few seconds. It builds a small untrained model, passes
two random tiles through it, and compares the losses with a float64 reference that is written in NumPy below. It prints
one line per check, and its exit code is 1 if a check fails.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from msvae import AutoencoderKLMultispectralAdapter

BATCH, BANDS, SIDE = 2, 5, 32
TOLERANCE = 1e-5
"""Largest relative difference between a loss in float32 and its float64 reference."""

Check = tuple[bool, str]
"""Result of a check: True if it passed, and the line that describes it."""


def small_model() -> AutoencoderKLMultispectralAdapter:
    """Return an untrained model with the architecture of a diffusers AutoencoderKL and few channels.

    `AutoencoderKLMultispectralAdapter.from_pretrained(hub_id_or_folder)` builds the same adapters around a trained
    backbone. Without `band_std`, the squared error is in units of reflectance squared.
    """
    torch.manual_seed(0)
    return AutoencoderKLMultispectralAdapter(
        adapter_placement="both",
        use_spectral_attention=True,
        use_sam_loss=True,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 16, 32, 64),
        norm_num_groups=4,
        latent_channels=16,
    )


def random_tiles() -> tuple[Tensor, Tensor]:
    """Return reflectance (B, C, H, W) and a leaf mask (B, 1, H, W) in which 1 is leaf and 0 is background."""
    generator = torch.Generator().manual_seed(1)
    sample = torch.rand(BATCH, BANDS, SIDE, SIDE, generator=generator)
    mask = torch.zeros(BATCH, 1, SIDE, SIDE)
    mask[0, :, 4:24, 6:30] = 1
    mask[1, :, 20:27, 2:5] = 1  # tiles with little leaf must not count more than their pixels
    return sample, mask


def reference(sample: Tensor, reconstruction: Tensor, mask: Tensor) -> tuple[np.ndarray, float]:
    """Return the squared error per band (C,) and the spectral angle in radians, both means over leaf pixels.

    A spectrum is one row of C bands. Bands are moved to the last axis before leaf pixels are selected, because a
    selection from (B, C, H, W) would mix pixels of one band into a "spectrum".
    """
    leaf = mask.numpy()[:, 0] > 0.5
    original = np.moveaxis(sample.numpy().astype(np.float64), 1, -1)[leaf]
    decoded = np.moveaxis(reconstruction.detach().numpy().astype(np.float64), 1, -1)[leaf]
    cosine = (original * decoded).sum(1) / (np.linalg.norm(original, axis=1) * np.linalg.norm(decoded, axis=1))
    return ((original - decoded) ** 2).mean(axis=0), float(np.arccos(np.clip(cosine, -1, 1)).mean())


def compare(name: str, value: float, expected: float) -> Check:
    """Check that a loss equals its reference within `TOLERANCE`."""
    error = abs(value - expected) / abs(expected)
    return error < TOLERANCE, f"{name}: {value:.8f}, reference {expected:.8f}, relative difference {error:.1e}"


def check_reference(model: AutoencoderKLMultispectralAdapter, sample: Tensor, mask: Tensor) -> Iterator[Check]:
    """Check squared error and spectral angle against the reference."""
    reconstruction, losses = model(sample=sample, mask=mask)
    mse_C, angle = reference(sample, reconstruction, mask)
    wavelengths_nm = model.config.wavelengths_nm
    for wavelength_nm, value, expected in zip(wavelengths_nm, losses["mse_per_channel"].tolist(), mse_C, strict=True):
        yield compare(f"masked MSE at {wavelength_nm:.0f} nm", value, expected)
    yield compare("masked MSE, mean over bands", losses["mse"].item(), mse_C.mean())
    yield compare("spectral angle in radians", losses["sam"].item(), angle)
    again = model.compute_losses(sample, reconstruction, mask=mask)
    same = all(torch.equal(again[term], losses[term]) for term in ("mse", "mse_per_channel", "sam"))
    yield same, f"compute_losses and forward: MSE {again['mse'].item():.8f} and {losses['mse'].item():.8f}"


def check_coverage(model: AutoencoderKLMultispectralAdapter, sample: Tensor, mask: Tensor) -> Iterator[Check]:
    """Check the mask statistics against counts of the mask."""
    stats = model(sample=sample, mask=mask)[1]["mask_stats"]
    valid, total = int((mask.numpy() > 0.5).sum()), BATCH * SIDE * SIDE
    yield stats["valid_pixels"].item() == valid, f"valid_pixels: {stats['valid_pixels'].item()}, expected {valid}"
    yield stats["total_pixels"].item() == total, f"total_pixels: {stats['total_pixels'].item()}, expected {total}"
    yield compare("coverage", stats["coverage"].item(), valid / total)


def check_background(model: AutoencoderKLMultispectralAdapter, sample: Tensor, mask: Tensor) -> Iterator[Check]:
    """Check that background pixels change no bit of the losses, the gradients and the reconstructed leaf."""
    leaf = mask.bool().expand_as(sample)
    reconstruction, losses, gradients = training_step(model, sample, mask)
    noise = 100 * torch.randn(sample.shape, generator=torch.Generator().manual_seed(2))
    backgrounds = {"0": 0.0, "noise": noise, "NaN": float("nan"), "infinity": float("inf")}
    for name, background in backgrounds.items():
        other = training_step(model, torch.where(leaf, sample, torch.as_tensor(background)), mask)
        same_losses = torch.equal(other[1]["mse_per_channel"], losses["mse_per_channel"])
        same_losses &= torch.equal(other[1]["sam"], losses["sam"])
        same_gradients = all(map(torch.equal, other[2], gradients))
        same_leaf = torch.equal(other[0][leaf], reconstruction[leaf])
        yield (
            same_losses and same_gradients and same_leaf,
            f"background of {name}: MSE {other[1]['mse'].item():.8f}, with the first background "
            f"{losses['mse'].item():.8f}; {len(gradients)} gradients and {int(leaf.sum())} leaf values compared",
        )


def training_step(
    model: AutoencoderKLMultispectralAdapter, sample: Tensor, mask: Tensor
) -> tuple[Tensor, dict[str, Any], list[Tensor]]:
    """Return reconstruction, losses and the gradient of each parameter that has one."""
    model.zero_grad()
    reconstruction, losses = model(sample=sample, mask=mask)
    (losses["mse"] + losses["sam"]).backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return reconstruction.detach(), losses, gradients


def check_mask_forms(model: AutoencoderKLMultispectralAdapter, sample: Tensor, mask: Tensor) -> Iterator[Check]:
    """Check that one plane for all bands, one plane per band, and bool and float masks mean the same."""
    expected = model(sample=sample, mask=mask)[1]["mse_per_channel"]
    forms = {
        f"mask of shape {BATCH, BANDS, SIDE, SIDE}": mask.expand_as(sample),
        "bool mask": mask.bool(),
        "float mask of 0.4 and 0.6": 0.4 + 0.2 * mask,
    }
    for name, form in forms.items():
        mse_C = model(sample=sample, mask=form)[1]["mse_per_channel"]
        difference = (mse_C - expected).abs().max().item()
        yield torch.equal(mse_C, expected), f"{name}: largest difference from {tuple(mask.shape)} is {difference}"
    try:
        model(sample=sample, mask=mask[:, 0])
        yield False, f"mask of shape {tuple(mask[:, 0].shape)}: no ValueError"
    except ValueError as error:
        yield True, f"mask of shape {tuple(mask[:, 0].shape)}: ValueError: {error}"


def check_no_mask(model: AutoencoderKLMultispectralAdapter, sample: Tensor, _: Tensor) -> Iterator[Check]:
    """Check that all pixels count if there is no mask."""
    reconstruction, losses = model(sample=sample, mask=None)
    mse_C, _angle = reference(sample, reconstruction, torch.ones(BATCH, 1, SIDE, SIDE))
    yield compare("MSE without a mask", losses["mse"].item(), mse_C.mean())
    coverage = losses["mask_stats"]["coverage"].item()
    yield coverage == 1, f"coverage without a mask: {coverage}, expected 1.0"


def check_empty_mask(model: AutoencoderKLMultispectralAdapter, sample: Tensor, mask: Tensor) -> Iterator[Check]:
    """Check that a batch without leaf has losses and gradients of 0, and no NaN."""
    _, losses, gradients = training_step(model, sample, torch.zeros_like(mask))
    mse, angle = losses["mse"].item(), losses["sam"].item()
    yield mse == 0 and angle == 0, f"empty mask: MSE {mse}, spectral angle {angle}, expected 0.0 and 0.0"
    largest = max(gradient.abs().max().item() for gradient in gradients)
    yield largest == 0, f"empty mask: largest gradient {largest}, expected 0.0"


def main() -> int:
    """Run all checks and return the exit code."""
    model = small_model()
    sample, mask = random_tiles()
    groups = (check_reference, check_coverage, check_background, check_mask_forms, check_no_mask, check_empty_mask)
    failed = 0
    for group in groups:
        for passed, line in group(model, sample, mask):
            print("ok    " if passed else "FAILED", line)
            failed += not passed
    print(f"{failed} checks failed" if failed else "all checks passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
