"""The training run: one global batch after another, with logging, evaluation and checkpoints."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from msvae.config import Config
from msvae.distributed.collectives import Ranks
from msvae.distributed.precision import AutocastModel
from msvae.distributed.setup import launched_precision
from msvae.distributed.watchdog import Watchdog
from msvae.files import write_text
from msvae.model.autoencoder import AutoencoderKLMultispectralAdapter
from msvae.model.build import build_model
from msvae.runs import RUN_CARD
from msvae.shards.loader import Batch
from msvae.shards.manifest import Manifest
from msvae.training.checkpoints import CheckpointWriter, save_model
from msvae.training.monitoring import DataMonitor, SkippedSteps, Warn
from msvae.training.optim import make_optimizer, schedule
from msvae.training.pace import Pace
from msvae.training.resume import Resume, run_identity
from msvae.training.run_card import as_code, as_list, run_card, settings
from msvae.training.run_log import RunLog
from msvae.training.run_storage import RunStorage
from msvae.training.step import Stepper, Sums, loss_row, optimizer_row
from msvae.training.stop import DelayedRead, StopRequest
from msvae.training.stream import TrainingStream
from msvae.training.trained_weights import NamedTensor, distribute
from msvae.training.validation import EvaluationModel, Validation

LONG_WAIT_S = 1.0
"""Warn if a step waited longer than this for the previous checkpoint."""


class Trainer:
    """A training run on this rank. The constructor reads the manifests, and the checkpoint to resume from, if any."""

    def __init__(self, config: Config, ranks: Ranks) -> None:
        self.config, self.ranks = config, ranks
        self.storage = RunStorage(config, ranks)
        self.stream = TrainingStream(config, ranks)
        manifest = self.stream.reader.manifest
        model = build_on_device(config, manifest, ranks)
        self.evaluation_model = EvaluationModel(model, bool(config.optim.ema_decay), ranks.engine.shards_weights)
        self.validation = Validation(config, ranks, self.evaluation_model)
        self.identity = run_identity(config, manifest.digest(), model)
        # locked before checkpoints are read, because another run could write and remove them meanwhile
        ranks.broadcast_object(self.storage.lock_folder)
        resume = Resume(config, ranks, self.identity)
        self.step, state = resume.step, resume.state
        self._save_untrained(is_new=state is None)
        if state is not None:
            resume.load_weights(model)
        if config.train.compile:
            model.compile()
        optimizer = make_optimizer(model, config.optim)
        self.state_names = optimizer.state_names
        precision = launched_precision()
        self.trained = distribute(ranks, AutocastModel(model, precision), optimizer, config)
        self.stepper = Stepper(config, ranks, model.leaf_losses, self.trained, optimizer, precision)
        self.data_monitor = DataMonitor(config.data, self.stream.reader, self.stream.order)
        self.skipped_steps = SkippedSteps(config, self.stream.order, self.stream.reader)
        if state is not None:
            resume.load_optimizer_state(self.trained, self.state_names)
            self.stepper.loss_scale.load_state_dict(state["loss_scale"])
            self.validation.load_state_dict(state["validation"])
            self.skipped_steps.load_state_dict(state["skipped_steps"])
            # a checkpoint of an earlier version has no `bad_samples`
            self.data_monitor.load_state_dict(state.get("bad_samples", ()))
        card = run_card(ranks, self.validation.digests | {"train": manifest.digest()})
        self.log = self._open_log(resume, card) if ranks.is_main else None
        self.writer = CheckpointWriter(config.folder, config.train.keep_checkpoints, self.storage.upload_later)
        self.pace = Pace(ranks, config.data.global_batch_size, self.step)

    def fit(self) -> bool:
        """Train up to `train.max_steps`, then save the model.

        Returns: True if training finished, False if the run was asked to stop before.
        """
        watchdog = Watchdog(self.config.folder, self.ranks.rank, self.config.train.timeout_s)
        stop = StopRequest()
        with ExitStack() as stack:
            stack.callback(self.storage.close)
            if self.log is not None:
                stack.callback(self.log.close)
            stack.callback(self.writer.close)
            stack.callback(watchdog.close)
            finished = self._train(watchdog, stop)
            self.writer.finish()
            if finished:
                self._save_model()
            if self.log is not None:
                self.log.finish()
            self.storage.finish()
            stop.ignore_signals()
            self.ranks.barrier()
        return finished

    def _train(self, watchdog: Watchdog, stop: StopRequest) -> bool:
        config, max_steps = self.config, self.config.train.max_steps
        watchdog.feed()
        # a run that was asked to stop does not evaluate its last step, so the next start does
        if self.step == 0 or (self._is_due(config.train.eval_every) and self.validation.score_at(self.step) is None):
            self.validation.run(self.step, self.log, self.trained)
        if self.step >= max_steps or self.validation.patience_exhausted:
            self._say(f"nothing left to train after step {self.step}")
            return True
        global_batches, stop_votes = self.stream.global_batches(self.step), DelayedRead()
        micro_batches = next(global_batches)
        self.stepper.warm_up(micro_batches)
        counts = self.ranks.all_reduce_sums(self.stepper.counts(micro_batches))
        self.pace.restart(self.step)
        while self.step < max_steps and not self.validation.patience_exhausted:
            watchdog.feed()
            lr_factor = schedule(self.step, max_steps, config.optim)
            totals, grad_norm = self.stepper.step(micro_batches, counts, lr_factor)
            self.step += 1
            finished_counts = counts
            micro_batches = self._next(global_batches) if self.step < max_steps else []
            # one collective sums the results of this global batch and the counts of the next one
            totals, counts, votes = self._reduce(totals, micro_batches, stop.vote(self.ranks.device))
            self.data_monitor.add(self.step, finished_counts)
            self.skipped_steps.add(self.step, grad_norm, finished_counts)
            self.pace.add(finished_counts)
            self._check_and_log(totals, finished_counts, lr_factor, grad_norm)
            stopped = stop_votes.exchange(votes) > 0
            with self.pace.paused():
                self._evaluate_and_save(stopped)
            if stopped:
                self._say(f"asked to stop: saved at step {self.step}; run the same command again to continue")
                return self.step == max_steps
        return True

    def _reduce(self, totals: Sums, micro_batches: list[Batch], vote: Tensor) -> tuple[Sums, Sums, Tensor]:
        """Sum over ranks: the totals of a global batch, the counts of the next one, and the votes to stop."""
        counts = self.stepper.counts(micro_batches) if micro_batches else {}
        # the norms are computed only for logged steps, but are always summed, so that all collectives have one size
        uses_average = self._is_logged and self.evaluation_model.uses_average
        squared_norms = self.trained.squared_norms() if uses_average else vote.new_zeros(2)
        shares = {
            **{f"total/{term}": total for term, total in totals.items()},
            **{f"count/{name}": count for name, count in counts.items()},
            "squared_norms": squared_norms,
            "vote": vote,
        }
        with self.pace.in_collective():
            reduced = self.ranks.all_reduce_sums(shares)
        self.squared_norms = reduced["squared_norms"]
        return (
            {term: reduced[f"total/{term}"] for term in totals},
            {name: reduced[f"count/{name}"] for name in counts},
            reduced["vote"],
        )

    def _next(self, global_batches: Iterator[list[Batch]]) -> list[Batch]:
        with self.pace.waiting_for_data():
            return next(global_batches)

    def _is_due(self, every: int) -> bool:
        return self.step == self.config.train.max_steps or (bool(every) and self.step % every == 0)

    @property
    def _is_logged(self) -> bool:
        return self._is_due(self.config.train.log_every) or self.step == 1

    def _check_and_log(self, totals: Sums, counts: Sums, lr_factor: float, grad_norm: Tensor) -> None:
        if self._is_due(self.config.data.check_every) or self.step == 1:
            self._check()
        elif self._is_logged:
            self.skipped_steps.check(self._warn)
        if self._is_logged and self.log is not None:
            self.log.step(self._row(totals, counts, lr_factor, float(grad_norm)))

    def _check(self) -> None:
        """Check the steps and the data since the last check."""
        self.skipped_steps.check(self._warn)
        self.data_monitor.check(self._warn)

    @property
    def _warn(self) -> Warn | None:
        return None if self.log is None else self.log.say

    def _row(self, totals: Sums, counts: Sums, lr_factor: float, grad_norm: float) -> dict[str, Any]:
        manifest, config = self.stream.reader.manifest, self.config
        return {
            "step": self.step,
            "epoch": self.step * config.data.global_batch_size / manifest.num_samples,
            **loss_row(config, manifest.bands, totals, counts, self.ranks.world_size),
            **optimizer_row(config, lr_factor, grad_norm, self.squared_norms),
            "skipped_steps": self.skipped_steps.empty + self.skipped_steps.nonfinite,
            **self.pace.row(self.step),
        }

    def _evaluate_and_save(self, stopped: bool) -> None:
        train = self.config.train
        self.writer.check()
        if self._is_due(train.eval_every) and (not stopped or self.step == train.max_steps):
            self.validation.run(self.step, self.log, self.trained)
        if self._is_due(train.checkpoint_every) or stopped or self.validation.patience_exhausted:
            # a checkpoint cannot store counts that are not checked yet
            self._check()
            self._save_checkpoint()

    def _save_checkpoint(self) -> None:
        if not self.ranks.is_main:
            # under ZeRO all ranks take part in gathering the tensors
            for _ in self._tensors():
                pass
            self.storage.upload_later()
            return
        assert self.log is not None
        self.log.flush()
        state = {
            "identity": self.identity,
            "config": self.config.model_dump(mode="json"),
            "updates": self.trained.updates,
            "averages": bool(self.config.optim.ema_decay),
            "loss_scale": self.stepper.loss_scale.state_dict(),
            "skipped_steps": self.skipped_steps.state_dict(),
            "bad_samples": self.data_monitor.state_dict(),
            "validation": self.validation.state_dict(),
            "score": self.validation.score_at(self.step),
        }
        waited_s = self.writer.save(self.step, self._tensors(), state)
        if waited_s > LONG_WAIT_S:
            self.log.say(
                f"warning: training waited {waited_s:.0f} s until the previous checkpoint was written; raise "
                "train.checkpoint_every, or choose an `out` on a faster disk"
            )

    def _tensors(self) -> Iterator[NamedTensor]:
        """Yield all tensors of a checkpoint. All ranks call this."""
        for kind in ("model", *self.state_names):
            for name, value in self.trained.full_tensors(kind):
                yield f"{kind}/{name}", value

    def _save_model(self) -> None:
        model = self.evaluation_model.update(self.trained)
        if self.ranks.is_main:
            save_model(model, self.config.folder / "model")
        self._say(f"finished at step {self.step}; the model is in {self.config.out}/model")

    def _save_untrained(self, is_new: bool) -> None:
        folder = self.config.folder / "untrained"
        if self.ranks.is_main and (is_new or not folder.exists()):
            save_model(self.evaluation_model.model, folder)

    def _open_log(self, resume: Resume, card: Mapping[str, str]) -> RunLog:
        """Write configuration and run card, and open the log of the main process. A new run starts a new log."""
        out = self.config.folder
        write_text(out / "config.yaml", self.config.dump())
        write_text(out / RUN_CARD, json.dumps(card, indent=1) + "\n")
        evaluated = self.validation.score_at(self.step) is not None
        log = RunLog(out, self.step or -1, self.config.train.max_steps, evaluated)
        texts = {"run/card": as_list(card), "run/config": as_code(self.config.dump())}
        log.describe(texts, settings(self.config))
        for damage in (*self.storage.damages, *resume.damages):
            log.say(f"warning: {damage}; resuming from the checkpoint before it")
        if self.step:
            log.say(f"resumed at step {self.step}{resume.changes}")
        if self.config.model.pretrained == "tiny" and self.config.model.train_backbone != "all":
            log.say(
                "warning: `tiny` has no trained weights, and its frozen weights stay random; use train_backbone: all"
            )
        return log

    def _say(self, line: str) -> None:
        if self.log is not None:
            self.log.say(line)


def build_on_device(config: Config, manifest: Manifest, ranks: Ranks) -> AutoencoderKLMultispectralAdapter:
    """Return the model on this rank's device, ready for training but not yet compiled.

    Raises: ValueError if it cannot be compiled.
    """
    if config.train.compile and ranks.engine.shards_weights:
        raise ValueError(
            "train.compile is true under ZeRO 3, which gathers and frees weights between layers; expected DDP, ZeRO 1 "
            "or 2: use zero2.yaml, or leave train.compile out"
        )
    with ranks.engine.local_main_first():
        model = build_model(
            config.model, config.loss, config.data.background, manifest.bands, manifest.statistics, config.train.seed
        )
    if config.train.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    # DeepSpeed flattens weights, so under DeepSpeed only tiles and activations are channels last
    if config.train.channels_last and not ranks.engine.uses_deepspeed:
        model.to(memory_format=torch.channels_last)
    model.to(ranks.device).train()
    return model
