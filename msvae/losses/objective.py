"""From sums and counts to the number that is trained: weights of the terms, and one division by global counts."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from msvae.losses.coverage import latent_coverage, mask_stats, valid_elements, valid_spectra
from msvae.losses.masked_sum import MaskedSum, divide_once


def term_counts(original_BCHW: Tensor, leaf_mask: Tensor, downscale: int) -> dict[str, Tensor]:
    """The count behind every term, from data alone: known before the first forward pass of a global batch.

    Returns: `mse` (C,), `sam` () and `kl` () counts, and `valid_pixels` and `total_pixels`.
    """
    valid_BCHW = valid_elements(original_BCHW, leaf_mask)
    stats = mask_stats(leaf_mask)
    return {
        "mse": valid_BCHW.sum(dim=(0, 2, 3)),
        "sam": valid_spectra(original_BCHW, valid_BCHW).sum(),
        "kl": latent_coverage(leaf_mask, downscale).sum(),
        "valid_pixels": stats["valid_pixels"],
        "total_pixels": stats["total_pixels"],
    }


def objective(sums: Mapping[str, MaskedSum], counts: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """This micro batch's share of the global loss: weighted sums over the counts of the whole global batch.

    Shares of all micro batches and ranks add up to the loss, and their gradients to its gradient.
    """
    shares = [weight * divide_once(sums[term].total, counts[term]) for term, weight in weights.items() if weight]
    return torch.stack(shares).sum()
