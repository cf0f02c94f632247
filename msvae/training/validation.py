"""The verdict on the validation split while training: numbers, pictures, and the best model so far."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np

from msvae.config import Config
from msvae.distributed.collectives import Ranks
from msvae.evaluation.evaluator import Evaluator, reconstruct_with
from msvae.metrics.aggregate import summarise
from msvae.model.saving import METRICS
from msvae.report.charts import bands_figure
from msvae.report.pictures import comparison_figure, index_figure, spectra_figure
from msvae.shards.cache import cache_for
from msvae.shards.reader import ShardReader
from msvae.training.build import EvaluationModel
from msvae.training.checkpoints import save_model
from msvae.training.log.run_log import RunLog
from msvae.training.parallel.trained_weights import Trained

NUM_PICTURES = 4


class Validation:
    """Judges the averaged weights on `data.val`; without one it does nothing."""

    def __init__(self, config: Config, ranks: Ranks, judged: EvaluationModel) -> None:
        self._config, self._ranks, self._judged, self._model = config, ranks, judged, judged.model
        self._best_loss: float | None = None
        self._last: tuple[int, float] | None = None
        self._since_best = 0
        self._evaluator = None
        model = judged.model
        if config.data.val is not None:
            reader = ShardReader(config.data.val, cache_for(config.data))
            if reader.manifest.bands != model.bands:
                raise ValueError(
                    f"{config.data.val} holds {reader.manifest.bands} named {', '.join(reader.manifest.band_names)}, "
                    f"{config.data.train} {model.bands} named {', '.join(model.bands.names)}; pack both together"
                )
            self._evaluator = Evaluator(reader, ranks, config.data.micro_batch_size, config.data.num_workers)

    @property
    def digests(self) -> dict[str, str]:
        """That of the manifest, by split."""
        digest = self._manifest_digest()
        return {} if digest is None else {"val": digest}

    def state(self) -> dict[str, Any]:
        """The best loss so far, what it was measured with, and what the model says of itself."""
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

    def resume(self, state: dict[str, Any]) -> None:
        """Go on from a saved state; what was measured on another split or with other weights is forgotten."""
        self._last = None if state["last"] is None else tuple(state["last"])
        if state["manifest_digest"] == self._manifest_digest():
            self._model.register_to_config(metrics=state["metrics"], band_importance=state["band_importance"])
            if state["loss_weights"] == self._config.loss.weights:
                self._best_loss, self._since_best = state["best_loss"], state["since_best"]
        # a machine that has become the main one may lack it
        if not self._config.out_is_url and not self._ranks.broadcast_object((self._config.folder / "best").exists):
            self._best_loss = None

    @property
    def exhausted(self) -> bool:
        """Whether `train.patience` evaluations in a row brought no lower loss. Equal on all ranks."""
        return 0 < self._config.train.patience <= self._since_best

    def score_at(self, step: int) -> float | None:
        """The loss, if it was measured at this very step."""
        return self._last[1] if self._last is not None and self._last[0] == step else None

    def run(self, step: int, log: RunLog | None, trained: Trained) -> None:
        """Evaluate on all ranks; the main process, which has the log, writes, and saves `best/` when it is."""
        if self._evaluator is None:
            return
        self._judged.follow(trained)
        row = self._judge(self._evaluator, step)
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
        self._judged.rest()

    def _manifest_digest(self) -> str | None:
        return None if self._evaluator is None else self._evaluator.reader.manifest.digest()

    def _judge(self, evaluator: Evaluator, step: int) -> dict[str, Any]:
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
