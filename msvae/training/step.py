"""One optimizer step over one global batch, the same however the batch is split over ranks and micro batches."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from msvae.bands import Bands
from msvae.config import Config
from msvae.distributed.collectives import Ranks
from msvae.distributed.precision import LossScale, Precision
from msvae.losses.coverage import tile_stats
from msvae.losses.objective import LeafLosses, can_compare, objective
from msvae.losses.spectra import count_nonfinite
from msvae.losses.terms import MaskedSum
from msvae.shards.loader import Batch
from msvae.shards.order import hash_key
from msvae.training.optim import AveragingAdamW
from msvae.training.trained_weights import TrainedWeights

Sums = dict[str, Tensor]


class Stepper:
    """Runs the forward and backward passes of this rank's micro batches of a global batch, and updates the weights."""

    def __init__(
        self, config: Config, ranks: Ranks, losses: LeafLosses, trained: TrainedWeights, optimizer: AveragingAdamW,
        precision: Precision,
    ) -> None:  # fmt: skip
        self._config, self._losses, self._trained, self._optimizer = config, losses, trained, optimizer
        self.loss_scale = LossScale(precision, ranks.device)
        # DDP and DeepSpeed average gradients over ranks, but each rank's loss is a share that must be added
        self._world_size = ranks.world_size
        self._memory_format = torch.channels_last if config.train.channels_last else torch.contiguous_format
        self._weights = config.loss.weights

    def counts(self, micro_batches: Sequence[Batch]) -> Sums:
        """Return this rank's counts of a global batch. They are summed over ranks before the first backward pass.

        Returns: the count of each term of the loss; `valid_pixels`, `total_pixels`, `leaf_elements` and
            `nonfinite_elements`, (); `tile_coverage` and `bad_slots`, one value per tile of the global batch.
            `bad_slots` is 1 where a sample could not be read. Tiles of other ranks are 0.
        """
        global_batch_size = self._config.data.global_batch_size
        tile_coverage = torch.zeros(global_batch_size, dtype=torch.float64, device=micro_batches[0].tiles.device)
        bad_slots = torch.zeros_like(tile_coverage)
        for batch in micro_batches:
            if batch.bad:
                bad_slots[[bad.slot for bad in batch.bad]] = 1
            first = batch.slots[0]
            leaf = batch.leaf_mask.flatten(1)
            tile_coverage[first : first + len(leaf)] = leaf.sum(dim=1).double() / leaf.shape[1]
        per_tile = {"tile_coverage": tile_coverage, "bad_slots": bad_slots}
        return _add([self._counts_of(batch) for batch in micro_batches]) | per_tile

    def warm_up(self, micro_batches: Sequence[Batch]) -> None:
        """Run and discard one backward pass at every start, so that DDP's summation order survives a resume."""

        def loss() -> Tensor:
            return objective(self._forward(micro_batches[0]), self.counts(micro_batches[:1]), self._weights)

        self._trained.warm_up(loss)

    def step(
        self, micro_batches: Sequence[Batch], counts: Mapping[str, Tensor], lr_factor: float
    ) -> tuple[Sums, Tensor]:
        """Update the weights by the gradient of the loss of the global batch.

        Nothing is changed if loss or gradient are not finite, or if no leaf value can be compared.

        Args: this rank's micro batches; counts of the whole global batch, summed over ranks; factor on the peak
            learning rate of each parameter group.
        Returns: this rank's sum of each term, still to be summed over ranks; norm of the gradient before clipping,
            () on the device, not finite if nothing was changed.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = group["peak_lr"] * lr_factor
        has_target = can_compare(counts, self._weights)
        # Without a target the gradient becomes NaN, not 0: moments and weight decay would act on a gradient of 0.
        self._trained.invalid = ~has_target
        totals = []
        for number, batch in enumerate(micro_batches, start=1):
            with self._trained.micro_batch(last=number == len(micro_batches)):
                sums = self._forward(batch)
                share = objective(sums, counts, self._weights)
                # an infinite loss may have a finite gradient
                self._trained.invalid = self._trained.invalid | ~share.detach().isfinite()
                self._trained.backward(share * self._world_size, self.loss_scale)
            totals.append({term: masked_sum.total.detach() for term, masked_sum in sums.items()})
        grad_norm = self._trained.update(self.loss_scale)
        self.loss_scale.update(~grad_norm.isfinite() & has_target)
        return _add(totals), grad_norm

    def _counts_of(self, batch: Batch) -> Sums:
        nonfinite, leaf = count_nonfinite(batch.tiles, batch.leaf_mask)
        return {
            **self._losses.counts(batch.tiles, batch.leaf_mask),
            "valid_pixels": batch.leaf_mask.sum(),
            "total_pixels": torch.full_like(leaf, batch.leaf_mask.numel()),
            "leaf_elements": leaf,
            "nonfinite_elements": nonfinite,
        }

    def _forward(self, batch: Batch) -> Mapping[str, MaskedSum]:
        _, losses = self._trained.forward(
            sample=batch.tiles.contiguous(memory_format=self._memory_format),
            mask=batch.leaf_mask,
            sample_posterior=self._config.model.sample_posterior,
            generator=self._generators(batch),
            # `counts` has counted the masks already
            sums_only=True,
        )
        sums: Mapping[str, MaskedSum] = losses["sums"]
        return sums

    def _generators(self, batch: Batch) -> list[torch.Generator] | None:
        """Return one random generator per sample. Its noise depends on seed, global batch and slot alone."""
        if not self._config.model.sample_posterior:
            return None
        seed, batch_index = self._config.train.seed, batch.plan.batch_index
        keys = [hash_key(seed, batch_index, slot) for slot in batch.slots]
        return [torch.Generator(batch.tiles.device).manual_seed(key % 2**63) for key in keys]


def loss_row(
    config: Config, bands: Bands, totals: Mapping[str, Tensor], counts: Mapping[str, Tensor], world_size: int
) -> dict[str, Any]:
    """Return the loss, its terms and the coverage of a global batch for the log.

    Args: sum and count of each term, summed over ranks.
    """
    sums = {term: MaskedSum(total, counts[term]) for term, total in totals.items()}
    means = {term: float(masked_sum.overall()) for term, masked_sum in sums.items()}
    row: dict[str, Any] = {
        "loss": sum(weight * means[term] for term, weight in config.loss.weights.items()),
        **means,
    }
    if "sam" in means:
        row["angle_deg"] = math.degrees(means["sam"])
    row |= coverage_row(counts, world_size)
    if "mse" in sums:
        row["mse_per_channel"] = dict(zip(bands.tags, sums["mse"].mean().tolist(), strict=True))
    return row


def coverage_row(counts: Mapping[str, Tensor], world_size: int = 1) -> dict[str, Any]:
    """Return the coverage of a global batch for the log. Ranks share the batch in equal, consecutive slices."""
    coverage_T = counts["tile_coverage"].cpu()
    coverage_R = coverage_T.view(world_size, -1).mean(dim=1)
    stats = tile_stats(coverage_T)
    return {
        "coverage": float(counts["valid_pixels"] / counts["total_pixels"]),
        "coverage_min": float(stats["min_coverage"]),
        "coverage_max": float(stats["max_coverage"]),
        "coverage_skew": float(coverage_R.max() - coverage_R.min()),
        "coverage_histogram": stats["histogram"].tolist(),
        "valid_pixels": int(counts["valid_pixels"]),
        "empty_tiles": int(stats["empty_tiles"]),
        "empty_share": float(stats["empty_tiles"] / stats["tiles"]),
        "nonfinite_elements": int(counts["nonfinite_elements"]),
        "bad_samples": int(counts["bad_slots"].sum()),
    }


def optimizer_row(config: Config, lr_factor: float, grad_norm: float, squared_norms: Tensor) -> dict[str, Any]:
    """Return learning rates, gradient norm and distance of the weights from their average for the log.

    Args: factor on the peak learning rates; norm of the gradient; `TrainedWeights.squared_norms`, summed over ranks.
    """
    optim = config.optim
    row: dict[str, Any] = {"lr": optim.lr * lr_factor}
    if optim.backbone_lr is not None:
        row["lr_backbone"] = optim.backbone_lr * lr_factor
    row["grad_norm"] = grad_norm if math.isfinite(grad_norm) else None
    if optim.ema_decay:
        distance, norm = squared_norms.sqrt().tolist()
        row["ema_distance"] = distance / norm
    return row


def _add(parts: Sequence[Mapping[str, Tensor]]) -> Sums:
    """Return element-wise sums of dictionaries with the same names, in float64."""
    return {name: torch.stack([part[name].double() for part in parts]).sum(dim=0) for name in parts[0]}
