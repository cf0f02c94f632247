"""One optimizer step over one global batch: the same result however it is split over ranks and micro batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from msvae.config import Config
from msvae.losses.objective import LeafLosses, objective
from msvae.losses.spectra import count_nonfinite
from msvae.shards.loader import Batch
from msvae.shards.order import hash_key

Sums = dict[str, Tensor]


class Stepper:
    """Runs forward and backward passes of a window (this rank's micro batches of one global batch)."""

    def __init__(
        self, accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer, config: Config
    ) -> None:
        self._accelerator, self._model, self._optimizer, self._config = accelerator, model, optimizer, config
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._losses: LeafLosses = accelerator.unwrap_model(model).leaf_losses
        # `backward` divides by the accumulation steps and DDP by the ranks; shares of the loss add up instead
        self._gradient_scale = accelerator.gradient_accumulation_steps * accelerator.num_processes
        self.weights = config.loss.weights

    def counts(self, window: Sequence[Batch]) -> Sums:
        """The counts behind the loss of a window, on this rank: to be joined before its first backward pass.

        Also `valid_pixels`, `total_pixels`, `leaf_elements`, `nonfinite_elements`; and with one entry a tile of the
        global batch `tile_coverage`, and `bad_slots`, 1 where a sample could not be read.
        """
        global_batch_size = self._config.data.global_batch_size
        tile_coverage = torch.zeros(global_batch_size, dtype=torch.float64, device=window[0].tiles.device)
        bad_slots = torch.zeros(global_batch_size, dtype=torch.float64)
        for batch in window:
            bad_slots[[bad.slot for bad in batch.bad]] = 1
            first = batch.plan.places[0].slot
            leaf = batch.leaf_mask.flatten(1)
            tile_coverage[first : first + len(leaf)] = leaf.sum(dim=1).double() / leaf.shape[1]
        of_tiles = {"tile_coverage": tile_coverage, "bad_slots": bad_slots.to(tile_coverage.device)}
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
        """Run one pass whose gradient is thrown away.

        DDP lays out its buckets after the first backward pass, and the layout decides in which order ranks are added.
        With this pass at every start, a resumed run adds in the same order as one that never stopped.
        """
        _, losses = self._model(sample=window[0].tiles, mask=window[0].leaf_mask)
        self._accelerator.backward(objective(losses["sums"], self.counts(window[:1]), self.weights))
        self._optimizer.zero_grad()

    def step(self, window: Sequence[Batch], counts: Mapping[str, Tensor], lr_share: float) -> tuple[Sums, Tensor]:
        """Change the weights by the gradient of the global loss.

        Args: this rank's micro batches; the counts of the whole global batch, joined over ranks; and the share of each
            group's peak learning rate.
        Returns: this rank's sums behind each term, to be joined; and the norm of the gradient before clipping.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = group["peak_lr"] * lr_share
        totals = []
        for batch in window:
            with self._accelerator.accumulate(self._model):
                _, losses = self._model(
                    sample=batch.tiles,
                    mask=batch.leaf_mask,
                    sample_posterior=self._config.model.sample_posterior,
                    generator=self._noise(batch),
                )
                share = objective(losses["sums"], counts, self.weights)
                self._accelerator.backward(share * self._gradient_scale)
            totals.append({term: masked_sum.total.detach() for term, masked_sum in losses["sums"].items()})
        limit = self._config.optim.max_grad_norm or float("inf")
        norm = self._accelerator.clip_grad_norm_(self._parameters, limit)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return added(totals), norm

    def _noise(self, batch: Batch) -> list[torch.Generator] | None:
        if not self._config.model.sample_posterior:
            return None
        seed, position = self._config.train.seed, batch.plan.position
        keys = [hash_key(seed, position, place.slot) for place in batch.plan.places]
        return [torch.Generator(batch.tiles.device).manual_seed(key % 2**63) for key in keys]


def added(parts: Sequence[Mapping[str, Tensor]]) -> Sums:
    """Element-wise sums of dictionaries with the same names, in float64."""
    return {name: torch.stack([part[name].double() for part in parts]).sum(dim=0) for name in parts[0]}
