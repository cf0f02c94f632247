"""One optimizer step over one global batch: the same result however it is split over ranks and micro batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from msvae.config import Config
from msvae.losses.objective import objective, term_counts
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
        self._downscale: int = accelerator.unwrap_model(model).downscale
        # `backward` divides by the accumulation steps and DDP by the ranks; shares of the loss add up instead
        self._gradient_scale = accelerator.gradient_accumulation_steps * accelerator.num_processes
        self.weights = {
            "mse": config.loss.mse_weight,
            "sam": config.loss.sam_weight,
            "kl": config.loss.kl_weight,
        }

    def counts(self, window: Sequence[Batch]) -> Sums:
        """The counts behind the loss of a window, on this rank: to be joined before its first backward pass."""
        return added([term_counts(batch.tiles, batch.leaf_mask, self._downscale) for batch in window])

    def settle(self, window: Sequence[Batch]) -> None:
        """Run one pass whose gradient is thrown away.

        DDP lays out its buckets after the first backward pass, and the layout decides in which order ranks are added.
        With this pass at every start, a resumed run adds in the same order as one that never stopped.
        """
        _, losses = self._model(sample=window[0].tiles, mask=window[0].leaf_mask)
        self._accelerator.backward(objective(losses["sums"], self.counts(window[:1]), self.weights))
        self._optimizer.zero_grad()

    def step(self, window: Sequence[Batch], counts: Mapping[str, Tensor], learning_rate: float) -> tuple[Sums, Tensor]:
        """Change the weights by the gradient of the global loss.

        Args: this rank's micro batches, and the counts of the whole global batch, joined over ranks.
        Returns: this rank's sums behind each term, to be joined; and the norm of the gradient before clipping.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
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
