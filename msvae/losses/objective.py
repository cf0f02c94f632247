"""From tiles to the number that is trained: which terms are computed, their counts, sums and weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from msvae.bands import Bands
from msvae.config import UNCOMPARED
from msvae.losses import terms
from msvae.losses.coverage import latent_coverage, valid_elements
from msvae.losses.masked_sum import MaskedSum, divide_once
from msvae.losses.spectra import count_elements_and_spectra, error_and_angle, has_spectrum, squared_error

PER_BAND = ("mse", "l1", "huber", "signature", "range")
PER_SPECTRUM = ("sam", "cosine")
TERMS = (*PER_BAND, *PER_SPECTRUM, "index", "kl")
"""Squared, absolute and Huber's error, mean leaf spectrum and excess of range, a number a band; spectral angle and its
`1 - cos`; vegetation indices; KL divergence. Those a band are in units of each band's spread over training leaves."""

_ON_ELEMENTS = {*PER_BAND, "index"} - {"mse"}


class LeafLosses:
    """The chosen terms on leaf pixels. A term that is not chosen is not computed.

    Args: names out of `TERMS`; the bands; side of a latent cell in pixels.
    Raises: ValueError for an unknown term, or vegetation indices without the bands for one.
    """

    def __init__(self, names: Sequence[str], bands: Bands, downscale: int) -> None:
        if unknown := [name for name in names if name not in TERMS]:
            raise ValueError(f"got unknown loss terms {', '.join(unknown)}; expected some of {', '.join(TERMS)}")
        self.names, self._downscale = tuple(names), downscale
        self._index_pairs = list(bands.index_pairs().values())
        if "index" in names and not self._index_pairs:
            raise ValueError(
                f"got {bands}, the index term needs near infrared and red or red edge; set its weight to 0"
            )

    def counts(self, original_BCHW: Tensor, leaf_mask: Tensor) -> dict[str, Tensor]:
        """The count behind every term, from data alone: known before the first forward pass of a global batch.

        Returns: counts by term, of the same shapes as in `sums`.
        """
        elements_C, spectra = count_elements_and_spectra(original_BCHW, leaf_mask)
        counts = dict.fromkeys(PER_BAND, elements_C) | dict.fromkeys(PER_SPECTRUM, spectra)
        if "index" in self.names:
            valid = valid_elements(original_BCHW, leaf_mask)
            counts["index"] = torch.stack([(valid[:, a] & valid[:, b]).sum() for a, b in self._index_pairs])
        if "kl" in self.names:
            counts["kl"] = latent_coverage(leaf_mask, self._downscale).sum()
        return {name: counts[name] for name in self.names}

    def sums(
        self,
        recon_BCHW: Tensor,
        original_BCHW: Tensor,
        leaf_mask: Tensor,
        unit_C: Tensor,
        posterior: tuple[Tensor, Tensor] | None = None,
    ) -> dict[str, MaskedSum]:
        """Sum and count of every term, KL only with a posterior.

        Args: reconstruction and original (B, C, H, W), reflectance; leaf mask (B, 1|C, H, W) bool; the spread of each
            band; mean and log variance of the posterior (B, latent channels, h, w).
        """
        sums = self._error_and_angle(recon_BCHW, original_BCHW, leaf_mask, unit_C)
        valid = valid_elements(original_BCHW, leaf_mask) if _ON_ELEMENTS.intersection(self.names) else leaf_mask
        images = recon_BCHW, original_BCHW, valid
        recipes: dict[str, Callable[[], MaskedSum]] = {
            "l1": lambda: terms.absolute_error(*images, unit_C),
            "huber": lambda: terms.huber_error(*images, unit_C),
            "signature": lambda: terms.signature_error(*images, unit_C),
            "range": lambda: terms.range_excess(recon_BCHW, valid, unit_C),
            "index": lambda: terms.index_error(*images, self._index_pairs),
            "cosine": lambda: terms.cosine_distance(recon_BCHW, original_BCHW, has_spectrum(original_BCHW, leaf_mask)),
        }
        if posterior is not None:
            recipes["kl"] = lambda: terms.kl_divergence(*posterior, latent_coverage(leaf_mask, self._downscale))
        sums |= {name: recipes[name]() for name in self.names if name in recipes}
        return {name: sums[name] for name in self.names if name in sums}

    def _error_and_angle(
        self, recon: Tensor, original: Tensor, leaf_mask: Tensor, unit_C: Tensor
    ) -> dict[str, MaskedSum]:
        sums = {}
        if "sam" in self.names:
            sums["mse"], sums["sam"] = error_and_angle(recon, original, leaf_mask)
        elif "mse" in self.names:
            sums["mse"] = squared_error(recon, original, leaf_mask)
        if sums:
            sums["mse"] = MaskedSum(sums["mse"].total / unit_C.square(), sums["mse"].count)
        return sums


def can_compare(counts: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """Whether a global batch has a leaf value to compare with, in a term that is trained. A bool, on the device."""
    compared = [counts[term].sum() for term in weights if term not in UNCOMPARED]
    return torch.stack(compared).sum() > 0


def objective(sums: Mapping[str, MaskedSum], counts: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """This micro batch's share of the global loss: weighted sums over the counts of the whole global batch.

    Shares of all micro batches and ranks add up to the loss, and their gradients to its gradient.
    """
    shares = [weight * divide_once(sums[term].total, counts[term]) for term, weight in weights.items()]
    return torch.stack(shares).sum()
