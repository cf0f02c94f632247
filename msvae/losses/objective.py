"""The training loss: which terms are computed, their sums and counts, and their weighted sum."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from msvae.bands import Bands
from msvae.config import TERMS_WITHOUT_TARGET
from msvae.losses import terms
from msvae.losses.coverage import latent_coverage, valid_elements
from msvae.losses.spectra import count_elements_and_spectra, error_and_angle, has_spectrum, squared_error
from msvae.losses.terms import MaskedSum, divide_once

PER_BAND = ("mse", "l1", "huber", "signature", "range")
PER_SPECTRUM = ("sam", "cosine")
TERMS = (*PER_BAND, *PER_SPECTRUM, "index", "kl")
"""All loss terms, by the names of the configuration.

`PER_BAND`: squared, absolute and Huber error, squared error of the mean leaf spectrum, and squared distance from the
range 0 to 1. They have one value per band, in units of the standard deviation of that band over training leaves.
`PER_SPECTRUM`: spectral angle in radians, and `1 - cos` of it.
`index`: absolute error of vegetation indices. `kl`: KL divergence of the posterior in nats per latent cell.
"""

_ON_ELEMENTS = {*PER_BAND, "index"} - {"mse"}
"""Terms that need `valid_elements`."""


class LeafLosses:
    """Sums and counts of the chosen terms over leaf pixels. Other terms are not computed.

    Args: names from `TERMS`; bands; side of a latent cell in pixels.
    Raises: ValueError if a name is unknown, or if `index` is chosen and the bands allow no vegetation index.
    """

    def __init__(self, names: Sequence[str], bands: Bands, downscale: int) -> None:
        if unknown := [name for name in names if name not in TERMS]:
            raise ValueError(f"got unknown loss terms {', '.join(unknown)}; expected some of {', '.join(TERMS)}")
        self.names, self._downscale = tuple(names), downscale
        self._index_pairs = list(bands.index_pairs().values())
        if "index" in names and not self._index_pairs:
            raise ValueError(
                f"got {bands}, the term `index` needs near infrared and red or red edge; set its weight to 0"
            )

    def counts(self, original_BCHW: Tensor, leaf_mask: Tensor) -> dict[str, Tensor]:
        """Return the count of every term. It depends on the data alone, so no forward pass is needed.

        Args: original (B, C, H, W), reflectance; leaf mask (B, 1|C, H, W) bool.
        Returns: counts by term, with the same shapes as in `sums`.
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
        """Return sum and count of every term; without a posterior there is no `kl`.

        Args: reconstruction and original (B, C, H, W), reflectance; leaf mask (B, 1|C, H, W) bool; standard deviation
            of each band (C,), reflectance; mean and log variance of the posterior, each (B, latent channels, h, w).
        """
        sums = self._error_and_angle(recon_BCHW, original_BCHW, leaf_mask, unit_C)
        valid = valid_elements(original_BCHW, leaf_mask) if _ON_ELEMENTS.intersection(self.names) else leaf_mask
        images = recon_BCHW, original_BCHW, valid
        compute: dict[str, Callable[[], MaskedSum]] = {
            "l1": lambda: terms.absolute_error(*images, unit_C),
            "huber": lambda: terms.huber_error(*images, unit_C),
            "signature": lambda: terms.signature_error(*images, unit_C),
            "range": lambda: terms.range_excess(recon_BCHW, valid, unit_C),
            "index": lambda: terms.index_error(*images, self._index_pairs),
            "cosine": lambda: terms.cosine_distance(recon_BCHW, original_BCHW, has_spectrum(original_BCHW, leaf_mask)),
        }
        if posterior is not None:
            compute["kl"] = lambda: terms.kl_divergence(*posterior, latent_coverage(leaf_mask, self._downscale))
        sums |= {name: compute[name]() for name in self.names if name in compute}
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
    """Return whether a global batch has any leaf value for a term that compares with the original, () bool.

    The result stays on the device. Terms in `TERMS_WITHOUT_TARGET` do not compare with the original.
    """
    compared = [counts[term].sum() for term in weights if term not in TERMS_WITHOUT_TARGET]
    return torch.stack(compared).sum() > 0


def objective(sums: Mapping[str, MaskedSum], counts: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """Return the share of one micro batch in the loss of its global batch, ().

    Sums of the micro batch are divided by the counts of the whole global batch and weighted. Shares of all micro
    batches and ranks therefore add up to the loss, and their gradients to its gradient.
    """
    shares = [weight * divide_once(sums[term].total, counts[term]) for term, weight in weights.items()]
    return torch.stack(shares).sum()
