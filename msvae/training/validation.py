"""Evaluation on the validation split during training: metrics, pictures, and the best model so far."""

from __future__ import annotations

import copy
import math
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from msvae.config import Config
from msvae.distributed.collectives import Ranks
from msvae.evaluation.evaluator import Evaluator, reconstruct_with
from msvae.metrics.aggregate import summarise
from msvae.model.autoencoder import AutoencoderKLMultispectralAdapter
from msvae.model.saving import METRICS
from msvae.report.charts import bands_figure
from msvae.report.pictures import comparison_figure, index_figure, spectra_figure
from msvae.shards.cache import cache_for
from msvae.shards.reader import ShardReader
from msvae.training.checkpoints import save_model
from msvae.training.optim import AVERAGE
from msvae.training.run_log import RunLog
from msvae.training.trained_weights import TrainedWeights

NUM_PICTURES = 4


class EvaluationModel:
    """A complete copy of the model on every rank, for evaluation and saving. It holds the averaged weights, if any.

    Frozen weights are shared with the trained model and not copied. Under ZeRO 3 they are copied, and the copy is kept
    in the memory of the machine between evaluations, because GPUs have no room for a complete model.
    """

    def __init__(self, model: AutoencoderKLMultispectralAdapter, uses_average: bool, offload: bool) -> None:
        self._device, self._offload = model.device, offload
        frozen: dict[int, object] = {id(p): _alias(p) for p in model.parameters() if not p.requires_grad}
        self.model: AutoencoderKLMultispectralAdapter = copy.deepcopy(model, frozen).eval().requires_grad_(False)
        self.model.disable_gradient_checkpointing()
        own = dict(self.model.named_parameters())
        self._weights = {name: own[name] for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.uses_average = uses_average
        self.release()

    def update(self, trained: TrainedWeights) -> AutoencoderKLMultispectralAdapter:
        """Copy the current weights, and return the model on this rank's device. All ranks call this."""
        self.model.to(self._device)
        with torch.no_grad():
            for name, value in trained.full_tensors(AVERAGE if self.uses_average else "model"):
                self._weights[name].copy_(value)
        return self.model

    def release(self) -> None:
        """Free the memory of the device until the next update, if the model is offloaded."""
        if self._offload:
            self.model.to("cpu")


class Validation:
    """Evaluates the evaluation model on `data.val`. Without a validation split it does nothing."""

    def __init__(self, config: Config, ranks: Ranks, evaluation_model: EvaluationModel) -> None:
        self._config, self._ranks = config, ranks
        self._evaluation_model, self._model = evaluation_model, evaluation_model.model
        self._best_loss: float | None = None
        self._last: tuple[int, float] | None = None
        self._since_best = 0
        self._evaluator = None
        model = self._model
        if config.data.val is not None:
            reader = ShardReader(config.data.val, cache_for(config.data))
            if reader.manifest.bands != model.bands:
                raise ValueError(
                    f"{config.data.val} holds {reader.manifest.bands} named {', '.join(reader.manifest.band_names)}, "
                    f"{config.data.train} holds {model.bands} named {', '.join(model.bands.names)}; pack both together"
                )
            self._evaluator = Evaluator(reader, ranks, config.data.micro_batch_size, config.data.num_workers)

    @property
    def digests(self) -> dict[str, str]:
        """Digest of the manifest under the key `val`; empty without a validation split."""
        digest = self._manifest_digest()
        return {} if digest is None else {"val": digest}

    def state_dict(self) -> dict[str, Any]:
        """Return the best loss, the settings it depends on, and the metrics in the config of the model."""
        config = self._model.config
        return {
            "best_loss": self._best_loss,
            "since_best": self._since_best,
            "last": self._last,
            "manifest_digest": self._manifest_digest(),
            "loss_weights": self._config.loss.weights,
            "band_importance": config.band_importance,
            "metrics": config.metrics,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from the state of a checkpoint. Results of another split or of other loss weights are dropped."""
        self._last = None if state["last"] is None else tuple(state["last"])
        if state["manifest_digest"] == self._manifest_digest():
            self._model.register_to_config(metrics=state["metrics"], band_importance=state["band_importance"])
            if state["loss_weights"] == self._config.loss.weights:
                self._best_loss, self._since_best = state["best_loss"], state["since_best"]
        # the main process may be on another machine now, which does not have the folder
        if not self._config.out_is_url and not self._ranks.broadcast_object((self._config.folder / "best").exists):
            self._best_loss = None

    @property
    def patience_exhausted(self) -> bool:
        """True after `train.patience` consecutive evaluations without a lower loss. Equal on all ranks."""
        return 0 < self._config.train.patience <= self._since_best

    def score_at(self, step: int) -> float | None:
        """Return the validation loss of exactly this step, or None if it was not evaluated."""
        return self._last[1] if self._last is not None and self._last[0] == step else None

    def run(self, step: int, log: RunLog | None, trained: TrainedWeights) -> None:
        """Evaluate on all ranks. The main process, which has the log, writes the results and saves `best/`."""
        if self._evaluator is None:
            return
        self._evaluation_model.update(trained)
        row = self._evaluate(self._evaluator, step)
        self._model.register_to_config(metrics={name: row[name] for name in METRICS if row[name] is not None})
        if log is not None:
            log.validation(row)
            self._draw(self._evaluator, step, log)
        self._last = step, row["loss"]
        self._since_best += 1
        if math.isfinite(row["loss"]) and (self._best_loss is None or row["loss"] < self._best_loss):
            self._best_loss, self._since_best = row["loss"], 0
            if self._ranks.is_main:
                save_model(self._model, self._config.folder / "best")
        self._evaluation_model.release()

    def _manifest_digest(self) -> str | None:
        return None if self._evaluator is None else self._evaluator.reader.manifest.digest()

    def _evaluate(self, evaluator: Evaluator, step: int) -> dict[str, Any]:
        losses = evaluator.loss_sums(self._model)
        summary = summarise(evaluator.tile_sums(losses))
        terms, band_weights = losses.means(self._ranks)
        self._model.register_to_config(band_importance=band_weights)
        row = {
            "step": step,
            "loss": sum(weight * terms[term] for term, weight in self._config.loss.weights.items() if term in terms),
            **terms,
            "psnr_db": summary.psnr_db,
            "angle_deg": summary.angle_deg,
            "ndvi_mae": summary.ndvi_mae,
            "ndre_mae": summary.ndre_mae,
            "ssim": summary.ssim,
            "rmse": dict(zip(evaluator.bands.tags, summary.rmse_per_band, strict=True)),
        }
        if band_weights is not None:
            row["band_importance"] = dict(zip(evaluator.bands.tags, band_weights, strict=True))
        return row

    def _draw(self, evaluator: Evaluator, step: int, log: RunLog) -> None:
        """Draw tiles that are spread evenly over the split; they are the same in each evaluation."""
        num_tiles, bands = evaluator.reader.manifest.num_samples, evaluator.bands
        slots = np.unique(np.linspace(0, num_tiles - 1, NUM_PICTURES).astype(int)).tolist()
        examples = evaluator.examples(reconstruct_with(self._model), slots)
        figures = {
            "tiles": partial(comparison_figure, examples, bands),
            "leaf_spectra": partial(spectra_figure, examples, bands),
            "bands": partial(bands_figure, examples, bands),
        }
        figures |= {index: partial(index_figure, examples, bands, index) for index in bands.index_pairs()}
        log.draw({f"validation/{name}": figure for name, figure in figures.items()}, step)


def _alias(parameter: nn.Parameter) -> nn.Parameter:
    """Return another parameter with the same memory. ZeRO 3 frees the memory of the original parameter."""
    return nn.Parameter(parameter.detach(), requires_grad=False)
