"""The training run: one global batch after another, judged, logged and saved on the way."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

from torch import Tensor

from msvae.config import Config
from msvae.distributed.collectives import Ranks
from msvae.distributed.precision import AutocastModel
from msvae.distributed.setup import launched_precision
from msvae.distributed.watchdog import Watchdog
from msvae.runs import RUN_CARD
from msvae.shards.loader import Batch
from msvae.training.build import EvaluationModel, build
from msvae.training.checkpoints import save_model
from msvae.training.identity import identity
from msvae.training.log.run_card import as_code, as_list, run_card, settings
from msvae.training.log.run_log import RunLog
from msvae.training.monitoring import DataWatch
from msvae.training.optim import make_optimizer, schedule
from msvae.training.pace import Pace
from msvae.training.parallel.spread import spread
from msvae.training.parallel.trained_weights import Named
from msvae.training.resume import Start
from msvae.training.run_storage import RunPlace
from msvae.training.skipped import SkippedSteps
from msvae.training.step import Stepper, Sums
from msvae.training.step_row import optimizer_row, step_row
from msvae.training.stop import Late, StopRequest
from msvae.training.stream import TrainingStream
from msvae.training.validation import Validation
from msvae.training.writer import CheckpointWriter

TOLD_WAIT_S = 1.0
"""Of one step, for a checkpoint before that is not written yet."""


class Trainer:
    """A run on this rank. Making it reads the manifests and, where `train.resume` finds one, a checkpoint."""

    def __init__(self, config: Config, ranks: Ranks) -> None:
        self.config, self.ranks = config, ranks
        self.place = RunPlace(config, self.ranks)
        self.stream = TrainingStream(config, self.ranks)
        manifest = self.stream.reader.manifest
        model = build(config, manifest, ranks)
        self.judged = EvaluationModel(model, bool(config.optim.ema_decay), ranks.engine.shards_weights)
        self.validation = Validation(config, self.ranks, self.judged)
        self.identity = identity(config, manifest.digest(), model)
        # before checkpoints are looked at: another run would write and remove them meanwhile
        self.ranks.broadcast_object(self.place.take)
        start = Start(config, self.ranks, self.identity)
        self.step, resumed = start.step, start.state
        self._keep_untrained(begins=resumed is None)
        if resumed is not None:
            start.put_weights(model)
        if config.train.compile:
            model.compile()
        optimizer = make_optimizer(model, config.optim)
        precision = launched_precision()
        self.trained = spread(ranks, AutocastModel(model, precision), optimizer, config)
        self.stepper = Stepper(config, self.ranks, model.leaf_losses, self.trained, optimizer, precision)
        self.kept = optimizer.kept
        self.watch = DataWatch(config.data, self.stream.reader, self.stream.order)
        self.skipped = SkippedSteps(config, self.stream.order, self.stream.reader)
        if resumed is not None:
            start.put_moments(self.trained, self.kept)
            self.stepper.loss_scale.load_state_dict(resumed["loss_scale"])
            self.validation.resume(resumed["validation"])
            self.skipped.resume(resumed["skipped_steps"])
            self.watch.resume(resumed.get("bad_samples", ()))
        card = run_card(ranks, self.validation.digests | {"train": manifest.digest()})
        self.log = self._open_log(start, card) if self.ranks.is_main else None
        self.writer = CheckpointWriter(config.folder, config.train.keep_checkpoints, self.place.offer)
        self.pace = Pace(self.ranks, config.data.global_batch_size, self.step)

    def fit(self) -> bool:
        """Train up to `train.max_steps`, then save the model.

        Returns: whether it came to its end, rather than being asked to stop before.
        """
        watchdog = Watchdog(self.config.folder, self.ranks.rank, self.config.train.timeout_s)
        stop = StopRequest()
        with ExitStack() as closing:
            closing.callback(self.place.close)
            if self.log is not None:
                closing.callback(self.log.close)
            closing.callback(self.writer.close)
            closing.callback(watchdog.close)
            finished = self._train(watchdog, stop)
            self.writer.finish()
            if finished:
                self._save_model()
            if self.log is not None:
                self.log.finish()
            self.place.finish()
            stop.served()
            self.ranks.barrier()
        return finished

    def _train(self, watchdog: Watchdog, stop: StopRequest) -> bool:
        config, max_steps = self.config, self.config.train.max_steps
        watchdog.feed()
        # a run that was asked to stop has left the evaluation of its step to this one
        if self.step == 0 or (self._due(config.train.eval_every) and self.validation.score_at(self.step) is None):
            self.validation.run(self.step, self.log, self.trained)
        if self.step >= max_steps or self.validation.exhausted:
            self._say(f"nothing left to train after step {self.step}")
            return True
        windows, stops = self.stream.windows(self.step), Late()
        window = next(windows)
        self.stepper.settle(window)
        counts = self.ranks.all_reduce_sums(self.stepper.counts(window))
        self.pace.restart(self.step)
        while self.step < max_steps and not self.validation.exhausted:
            watchdog.feed()
            lr_share = schedule(self.step, max_steps, config.optim)
            totals, grad_norm = self.stepper.step(window, counts, lr_share)
            self.step += 1
            finished = counts
            window = self._next(windows) if self.step < max_steps else []
            # what was learned of this global batch and what must be known of the next travel together
            totals, counts, asked = self._join(totals, window, stop.vote(self.ranks.device))
            self.watch.add(self.step, finished)
            self.skipped.add(self.step, grad_norm, finished)
            self.pace.add(finished)
            self._look_and_log(totals, finished, lr_share, grad_norm)
            stopped = stops.swap(asked) > 0
            with self.pace.aside():
                self._judge_and_save(stopped)
            if stopped:
                self._say(f"asked to stop: saved at step {self.step}; run the same command again to go on")
                return self.step == max_steps
        return True

    def _join(self, totals: Sums, window: list[Batch], vote: Tensor) -> tuple[Sums, Sums, Tensor]:
        counts = self.stepper.counts(window) if window else {}
        # sent at every step, so that ranks agree on its size, though computed where it is logged
        squares = self.trained.squares_from_average() if self._logs and self.judged.averages else vote.new_zeros(2)
        shares = {
            **{f"total/{term}": total for term, total in totals.items()},
            **{f"count/{name}": count for name, count in counts.items()},
            "squares": squares,
            "stop": vote,
        }
        with self.pace.joining():
            joined = self.ranks.all_reduce_sums(shares)
        self.squares = joined["squares"]
        return (
            {term: joined[f"total/{term}"] for term in totals},
            {name: joined[f"count/{name}"] for name in counts},
            joined["stop"],
        )

    def _next(self, windows: Iterator[list[Batch]]) -> list[Batch]:
        with self.pace.waiting_for_data():
            return next(windows)

    def _due(self, every: int) -> bool:
        return self.step == self.config.train.max_steps or (bool(every) and self.step % every == 0)

    @property
    def _logs(self) -> bool:
        return self._due(self.config.train.log_every) or self.step == 1

    def _look_and_log(self, totals: Sums, counts: Sums, lr_share: float, grad_norm: Tensor) -> None:
        if self._due(self.config.data.check_every) or self.step == 1:
            self._look()
        elif self._logs:
            self.skipped.look(self._warn)
        if self._logs and self.log is not None:
            self.log.step(self._row(totals, counts, lr_share, float(grad_norm)))

    def _look(self) -> None:
        """Judge what was seen since the last look."""
        self.skipped.look(self._warn)
        self.watch.look(self._warn)

    @property
    def _warn(self) -> Callable[[str], None] | None:
        return None if self.log is None else self.log.say

    def _row(self, totals: Sums, counts: Sums, lr_share: float, grad_norm: float) -> dict[str, Any]:
        manifest, config = self.stream.reader.manifest, self.config
        return {
            "step": self.step,
            "epoch": self.step * config.data.global_batch_size / manifest.num_samples,
            **step_row(config, manifest.bands, totals, counts, self.ranks.world_size),
            **optimizer_row(config, lr_share, grad_norm, self.squares),
            "skipped_steps": self.skipped.empty + self.skipped.nonfinite,
            **self.pace.row(self.step),
        }

    def _judge_and_save(self, stopped: bool) -> None:
        train = self.config.train
        self.writer.check()
        if self._due(train.eval_every) and (not stopped or self.step == train.max_steps):
            self.validation.run(self.step, self.log, self.trained)
        if self._due(train.checkpoint_every) or stopped or self.validation.exhausted:
            # the checkpoint forgets what was seen
            self._look()
            self._save()

    def _save(self) -> None:
        if not self.ranks.is_main:
            # ranks that hold shares of the weights must hand them over
            for _ in self._tensors():
                pass
            self.place.offer()
            return
        assert self.log is not None
        self.log.flush()
        state = {
            "identity": self.identity,
            "config": self.config.model_dump(mode="json"),
            "updates": self.trained.updates,
            "averages": bool(self.config.optim.ema_decay),
            "loss_scale": self.stepper.loss_scale.state_dict(),
            "skipped_steps": self.skipped.state(),
            "bad_samples": self.watch.state(),
            "validation": self.validation.state(),
            "score": self.validation.score_at(self.step),
        }
        waited_s = self.writer.save(self.step, self._tensors(), state)
        if waited_s > TOLD_WAIT_S:
            self.log.say(
                f"warning: training stood still for {waited_s:.0f} s until the checkpoint before was written; raise "
                "train.checkpoint_every, or give `out` on a faster disk"
            )

    def _tensors(self) -> Iterator[Named]:
        for kind in ("model", *self.kept):
            for name, value in self.trained.values(kind):
                yield f"{kind}/{name}", value

    def _save_model(self) -> None:
        model = self.judged.follow(self.trained)
        if self.ranks.is_main:
            save_model(model, self.config.folder / "model")
        self._say(f"finished at step {self.step}; the model is in {self.config.out}/model")

    def _keep_untrained(self, begins: bool) -> None:
        untrained = self.config.folder / "untrained"
        if self.ranks.is_main and (begins or not untrained.exists()):
            save_model(self.judged.model, untrained)

    def _open_log(self, start: Start, card: Mapping[str, str]) -> RunLog:
        """Of the main process; a run that begins anew starts it anew."""
        out = self.config.folder
        (out / "config.yaml").write_text(self.config.dump())
        (out / RUN_CARD).write_text(json.dumps(card, indent=1) + "\n")
        judged = self.validation.score_at(self.step) is not None
        log = RunLog(out, self.step or -1, self.config.train.max_steps, judged)
        texts = {"run/card": as_list(card), "run/config": as_code(self.config.dump())}
        log.describe(texts, settings(self.config))
        for fault in (*self.place.faults, *start.faults):
            log.say(f"warning: {fault}; going on from the checkpoint before")
        if self.step:
            log.say(f"resumed at step {self.step}{start.changes}")
        if self.config.model.pretrained == "tiny" and self.config.model.train_backbone != "all":
            log.say("warning: `tiny` has no trained weights, and what is frozen stays random; use train_backbone: all")
        return log

    def _say(self, line: str) -> None:
        if self.log is not None:
            self.log.say(line)
