"""One optimizer step over one global batch: the same result however it is split over ranks and micro batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from msvae.config import Config
from msvae.distributed.collectives import Ranks
from msvae.distributed.precision import LossScale, Precision
from msvae.losses.objective import LeafLosses, can_compare, objective
from msvae.losses.spectra import count_nonfinite
from msvae.losses.terms import MaskedSum
from msvae.shards.loader import Batch
from msvae.shards.order import hash_key
from msvae.training.optim import AveragingAdamW
from msvae.training.parallel.trained_weights import Trained

Sums = dict[str, Tensor]


class Stepper:
    """Runs forward and backward passes of a window (this rank's micro batches of one global batch)."""

    def __init__(
        self, config: Config, ranks: Ranks, losses: LeafLosses, trained: Trained, optimizer: AveragingAdamW,
        precision: Precision,
    ) -> None:  # fmt: skip
        self._config, self._losses, self._trained, self._optimizer = config, losses, trained, optimizer
        self.loss_scale = LossScale(precision, ranks.device)
        # DDP and DeepSpeed average gradients over the ranks; shares of the loss add up instead
        self._num_shares = ranks.world_size
        self._memory_format = torch.channels_last if config.train.channels_last else torch.contiguous_format
        self.weights = config.loss.weights

    def counts(self, window: Sequence[Batch]) -> Sums:
        """The counts behind the loss of a window, on this rank: to be joined before its first backward pass.

        Also `valid_pixels`, `total_pixels`, `leaf_elements`, `nonfinite_elements`; and with one entry a tile of the
        global batch `tile_coverage`, and `bad_slots`, 1 where a sample could not be read.
        """
        global_batch_size = self._config.data.global_batch_size
        tile_coverage = torch.zeros(global_batch_size, dtype=torch.float64, device=window[0].tiles.device)
        bad_slots = torch.zeros_like(tile_coverage)
        for batch in window:
            if batch.bad:
                bad_slots[[bad.slot for bad in batch.bad]] = 1
            first = batch.plan.samples[0].slot
            leaf = batch.leaf_mask.flatten(1)
            tile_coverage[first : first + len(leaf)] = leaf.sum(dim=1).double() / leaf.shape[1]
        of_tiles = {"tile_coverage": tile_coverage, "bad_slots": bad_slots}
        return added([self._batch_counts(batch) for batch in window]) | of_tiles

    def _batch_counts(self, batch: Batch) -> Sums:
        nonfinite, leaf = count_nonfinite(batch.tiles, batch.leaf_mask)
        return {
            **self._losses.counts(batch.tiles, batch.leaf_mask),
            "valid_pixels": batch.leaf_mask.sum(),
            "total_pixels": torch.full_like(leaf, batch.leaf_mask.numel()),
            "leaf_elements": leaf,
            "nonfinite_elements": nonfinite,
        }

    def settle(self, window: Sequence[Batch]) -> None:
        """With this at every start, a resumed run adds ranks in the same order as one that never stopped."""

        def loss() -> Tensor:
            return objective(self._forward(window[0]), self.counts(window[:1]), self.weights)

        self._trained.settle(loss)

    def step(self, window: Sequence[Batch], counts: Mapping[str, Tensor], lr_share: float) -> tuple[Sums, Tensor]:
        """Change the weights by the gradient of the global loss, unless one is not finite or no leaf can be compared.

        Args: this rank's micro batches; the counts of the whole global batch, joined over ranks; and the share of each
            group's peak learning rate.
        Returns: this rank's sums behind each term, to be joined; and the norm of the gradient before clipping, not
            finite when nothing was changed.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = group["peak_lr"] * lr_share
        has_target = can_compare(counts, self.weights)
        # without one there is no gradient, rather than one of 0 that moments and weight decay would act on
        self._trained.spoilt = ~has_target
        totals = []
        for number, batch in enumerate(window, start=1):
            with self._trained.micro_batch(last=number == len(window)):
                sums = self._forward(batch)
                share = objective(sums, counts, self.weights)
                # an infinite loss may have a finite gradient
                self._trained.spoilt = self._trained.spoilt | ~share.detach().isfinite()
                self._trained.backward(share * self._num_shares, self.loss_scale)
            totals.append({term: masked_sum.total.detach() for term, masked_sum in sums.items()})
        norm = self._trained.update(self.loss_scale)
        self.loss_scale.update(~norm.isfinite() & has_target)
        return added(totals), norm

    def _forward(self, batch: Batch) -> Mapping[str, MaskedSum]:
        _, losses = self._trained.forward(
            sample=batch.tiles.contiguous(memory_format=self._memory_format),
            mask=batch.leaf_mask,
            sample_posterior=self._config.model.sample_posterior,
            generator=self._noise(batch),
        )
        sums: Mapping[str, MaskedSum] = losses["sums"]
        return sums

    def _noise(self, batch: Batch) -> list[torch.Generator] | None:
        if not self._config.model.sample_posterior:
            return None
        seed, position = self._config.train.seed, batch.plan.batch_index
        keys = [hash_key(seed, position, sample.slot) for sample in batch.plan.samples]
        return [torch.Generator(batch.tiles.device).manual_seed(key % 2**63) for key in keys]


def added(parts: Sequence[Mapping[str, Tensor]]) -> Sums:
    """Element-wise sums of dictionaries with the same names, in float64."""
    return {name: torch.stack([part[name].double() for part in parts]).sum(dim=0) for name in parts[0]}
