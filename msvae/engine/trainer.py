"""The training run: one global batch after another, judged, logged and saved on the way."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping
from typing import Any

from accelerate import Accelerator
from crc32c import crc32c
from torch import Tensor

from msvae.config import Config
from msvae.engine import checkpoint
from msvae.engine.logging import RunLog
from msvae.engine.optim import MovingAverage, make_optimizer, schedule
from msvae.engine.ranks import Ranks
from msvae.engine.step import Stepper, Sums
from msvae.engine.stream import TrainingStream, accumulation_steps
from msvae.engine.validation import Validation
from msvae.engine.watch import DataWatch, coverage_row
from msvae.losses.masked_sum import MaskedSum
from msvae.model.autoencoder import AutoencoderKLMultispectralAdapter
from msvae.model.build import build_model
from msvae.shards.loader import Batch


class Trainer:
    """A run on this rank. Making it reads the manifests and, where `train.resume` finds one, a checkpoint."""

    def __init__(self, config: Config, accelerator: Accelerator) -> None:
        self.config, self.ranks = config, Ranks(accelerator)
        accelerator.gradient_accumulation_steps = accumulation_steps(config, self.ranks.world_size)
        self.stream = TrainingStream(config, self.ranks)
        self.reader = self.stream.reader
        self.watch = DataWatch(config.data, self.reader, self.stream.order)
        model = self._build(accelerator)
        optimizer = make_optimizer(model, config.optim)
        self.model, self.average = model, MovingAverage(model.get_trainable_params(), config.optim.ema_decay)
        self.trained = checkpoint.TrainedState(model, optimizer, self.average)
        self.identity = checkpoint.identity(config, self.reader.manifest.digest(), model)
        self.validation = Validation(config, self.ranks, model, self.average)
        self.changes = ""
        self.step = self._resume()
        wrapped, stepping = accelerator.prepare(model, optimizer)
        self.stepper = Stepper(accelerator, wrapped, stepping, config)
        self.log = self._open_log()
        self.data_wait_s, self.logged_step, self.logged_at_s = 0.0, self.step, time.monotonic()

    def fit(self) -> None:
        """Train up to `train.max_steps`, then save the model."""
        try:
            if self.step == 0:
                self.validation.run(0, self.log)
            if self.step < self.config.train.max_steps:
                self._train()
            elif self.log is not None:
                self.log.say(f"nothing left to train: train.max_steps is {self.config.train.max_steps}")
            if self.log is not None:
                with self.average.in_place():
                    checkpoint.save_model(self.model, self.config.out / "model")
                self.log.say(f"finished at step {self.step}; the model is in {self.config.out / 'model'}")
            self.ranks.wait()
        finally:
            if self.log is not None:
                self.log.close()

    def _train(self) -> None:
        config, windows = self.config, self.stream.windows(self.step)
        window = next(windows)
        self.stepper.settle(window)
        counts = self.ranks.sum(self.stepper.counts(window))
        self.logged_at_s = time.monotonic()
        while self.step < config.train.max_steps:
            lr_share = schedule(self.step, config.train.max_steps, config.optim)
            totals, grad_norm = self.stepper.step(window, counts, lr_share)
            self.average.update()
            self.step += 1
            finished = counts
            if self.step < config.train.max_steps:
                window = self._next(windows)
                # what was learned of this global batch and what must be known of the next travel together
                totals, counts = self._join(totals, self.stepper.counts(window))
            else:
                totals, _ = self._join(totals, {})
            self.watch.add(self.step, finished)
            # a checkpoint forgets what was seen, so it is judged before
            if self._due(config.data.check_every) or self._due(config.train.checkpoint_every) or self.step == 1:
                self.watch.look(None if self.log is None else self.log.say)
            if self._due(config.train.log_every) or self.step == 1:
                self._check_finite(grad_norm)
                self._log_step(totals, finished, lr_share, float(grad_norm))
            self._judge_and_save(grad_norm)

    def _judge_and_save(self, grad_norm: Tensor) -> None:
        began_s, train = time.monotonic(), self.config.train
        if self._due(train.eval_every):
            self.validation.run(self.step, self.log)
        if self._due(train.checkpoint_every):
            self._check_finite(grad_norm)
            if self.ranks.is_main:
                state = {
                    "identity": self.identity,
                    "validation": self.validation.state(),
                    "config": self.config.model_dump(mode="json"),
                }
                checkpoint.save(self.config.out, self.step, self.trained, state, train.keep_checkpoints)
            self.ranks.wait()
        self.logged_at_s += time.monotonic() - began_s

    def _build(self, accelerator: Accelerator) -> AutoencoderKLMultispectralAdapter:
        config = self.config
        with accelerator.local_main_process_first():
            model = build_model(
                config.model, config.loss, config.data.background, self.reader.manifest, config.train.seed
            )
        if config.train.compile:
            model.compile()
        model.to(accelerator.device).train()
        return model

    def _resume(self) -> int:
        """The step to go on from, agreed by all ranks."""
        path = checkpoint.choose(self.config)
        state: dict[str, Any] = {"step": 0, "identity": self.identity} if path is None else checkpoint.load_state(path)
        self._agree(state)
        if path is not None:
            checkpoint.check_identity(path, state, self.identity, self.config)
            self.changes = checkpoint.changes(state["config"], self.config.model_dump(mode="json"))
        untrained = self.config.out / "untrained"
        if self.ranks.is_main and (path is None or not untrained.exists()):
            checkpoint.save_model(self.model, untrained)
        if path is not None:
            checkpoint.restore(path, self.trained)
            self.average.resume(state["step"])
            self.validation.resume(state["validation"])
        return int(state["step"])

    def _agree(self, state: Mapping[str, Any]) -> None:
        """Compare what this rank found with what the others did.

        Raises: ValueError on every rank when one sees another run, step or data set.
        """
        places = self.ranks.gather(state["step"])
        identity = json.dumps([state["identity"], self.identity], sort_keys=True)
        identities = self.ranks.gather(crc32c(identity.encode()))
        if len(set(places)) > 1 or len(set(identities)) > 1:
            raise ValueError(
                f"ranks would start apart, at steps {places}, on data and settings {identities}; "
                "every node must see the same `out`, shards and configuration"
            )

    def _open_log(self) -> RunLog | None:
        """The main process writes the log; a run that begins anew starts it anew."""
        if not self.ranks.is_main:
            return None
        out = self.config.out
        out.mkdir(parents=True, exist_ok=True)
        (out / "config.yaml").write_text(self.config.dump())
        log = RunLog(out, self.step or -1, self.config.train.max_steps)
        log.text("config", self.config.dump())
        if self.step:
            log.say(f"resumed at step {self.step}{self.changes}")
        if self.config.model.pretrained == "tiny" and self.config.model.train_backbone != "all":
            log.say("warning: `tiny` has no trained weights, and what is frozen stays random; use train_backbone: all")
        return log

    def _next(self, windows: Iterator[list[Batch]]) -> list[Batch]:
        began_s = time.monotonic()
        window = next(windows)
        self.data_wait_s += time.monotonic() - began_s
        return window

    def _join(self, totals: Sums, next_counts: Sums) -> tuple[Sums, Sums]:
        joined = self.ranks.sum({**{f"total/{term}": total for term, total in totals.items()}, **next_counts})
        return {term: joined[f"total/{term}"] for term in totals}, {name: joined[name] for name in next_counts}

    def _due(self, every: int) -> bool:
        return self.step == self.config.train.max_steps or (bool(every) and self.step % every == 0)

    def _check_finite(self, grad_norm: Tensor) -> None:
        """Stop before a broken model is saved. The norm is of the joined gradient, so all ranks stop alike."""
        if not math.isfinite(grad_norm):
            raise ValueError(
                f"the gradient of step {self.step} is {float(grad_norm)}; checkpoints are from before it. "
                "Lower optim.lr, or find the tiles of this step with data.trace: true"
            )

    def _log_step(self, totals: Sums, counts: Sums, lr_share: float, grad_norm: float) -> None:
        if self.log is None:
            return
        sums = {term: MaskedSum(total, counts[term]) for term, total in totals.items()}
        means = {term: float(masked_sum.overall()) for term, masked_sum in sums.items()}
        now_s, global_batch_size = time.monotonic(), self.config.data.global_batch_size
        self.log.step(
            {
                "step": self.step,
                "epoch": self.step * global_batch_size / self.reader.manifest.num_samples,
                "loss": sum(weight * means[term] for term, weight in self.stepper.weights.items()),
                **means,
                **coverage_row(counts),
                **self._rates(lr_share),
                "grad_norm": grad_norm,
                "samples_per_s": (self.step - self.logged_step) * global_batch_size / (now_s - self.logged_at_s),
                "data_wait_s": self.data_wait_s / (self.step - self.logged_step),
                **self._per_band(sums),
            }
        )
        self.logged_step, self.logged_at_s, self.data_wait_s = self.step, now_s, 0.0

    def _rates(self, lr_share: float) -> dict[str, float]:
        optim = self.config.optim
        own = {} if optim.backbone_lr is None else {"lr_backbone": optim.backbone_lr * lr_share}
        return {"lr": optim.lr * lr_share, **own}

    def _per_band(self, sums: Mapping[str, MaskedSum]) -> dict[str, dict[str, float]]:
        if "mse" not in sums:
            return {}
        per_band = sums["mse"].mean().tolist()
        return {"mse_per_channel": dict(zip(self.reader.manifest.bands.tags, per_band, strict=True))}
