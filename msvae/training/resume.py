"""Start of a run: from the beginning, or from a checkpoint that one rank reads and sends to all others.

Machines therefore need no shared disk, and a checkpoint of any engine and world size can be resumed under any other.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from crc32c import crc32c
from torch import Tensor, nn

from msvae.config import Config
from msvae.distributed.collectives import Ranks
from msvae.messages import counted
from msvae.training import checkpoints
from msvae.training.optim import AVERAGE
from msvae.training.trained_weights import TrainedWeights

MANIFEST, FROZEN = "manifest_digest", "frozen_parameters"
"""Digests in a run identity. A digest shows that two runs differ, but not in which value."""


class Resume:
    """The checkpoint that `train.resume` selects, or none for a new run. All ranks create it together."""

    def __init__(self, config: Config, ranks: Ranks, identity: dict[str, Any]) -> None:
        self._ranks = ranks
        reads_disk = ranks.is_main or ranks.is_local_main
        self._path, damages = ranks.run_on_all(lambda: choose_checkpoint(config) if reads_disk else (None, []))
        steps = ranks.all_gather_int(0 if self._path is None else int(checkpoints.load_state(self._path)["step"]))
        if config.train.resume not in ("auto", "never") and not any(steps):
            raise ValueError(
                f"{config.train.resume} is not a checkpoint on any machine; pass the path of a folder step-…"
            )
        self._source = steps.index(max(steps))
        found = ranks.broadcast_object(self._describe(config, damages), self._source)
        self.damages: list[str] = found["faults"]
        """The damage of each newer checkpoint."""
        self.state: dict[str, Any] | None = found["state"]
        """State of the checkpoint; None for a new run."""
        self._check_same_on_all_ranks(identity)
        self.changes = ""
        """Changed configuration values, as a text that follows "resumed"."""
        if self.state is not None:
            check_identity(found["path"], self.state, identity, config)
            self.changes = changed_values(self.state["config"], config.model_dump(mode="json"))

    @property
    def step(self) -> int:
        """Number of finished steps."""
        return 0 if self.state is None else int(self.state["step"])

    def load_weights(self, model: nn.Module) -> None:
        """Load the weights of the checkpoint into the model of every rank, before it is distributed over the ranks.

        Raises: ValueError if they belong to another model.
        """
        weights = {f"model/{name}": p.detach() for name, p in model.named_parameters() if p.requires_grad}
        self._check_names_and_shapes(weights)
        for name, value in self._broadcast_tensors({name: weight.shape for name, weight in weights.items()}):
            weights[name].copy_(value)

    def load_optimizer_state(self, trained: TrainedWeights, state_names: tuple[str, ...]) -> None:
        """Load the moments and the average of the checkpoint.

        If the checkpoint has no average, the average starts at the weights.
        """
        assert self.state is not None
        trained.updates = self.state["updates"]
        kinds = [kind for kind in state_names if kind != AVERAGE or self.state["averages"]]
        for kind in kinds:
            shapes = {f"{kind}/{name}": shape for name, shape in trained.shapes.items()}
            for name, value in self._broadcast_tensors(shapes):
                trained.load(kind, name.removeprefix(f"{kind}/"), value)

    def _describe(self, config: Config, damages: list[str]) -> Callable[[], dict[str, Any]]:
        state = None if self._path is None else checkpoints.load_state(self._path)
        path = str(self._path).replace(str(config.folder), str(config.out))
        return lambda: {"path": path, "state": state, "faults": damages}

    def _broadcast_tensors(self, shapes: dict[str, torch.Size]) -> Iterator[tuple[str, Tensor]]:
        tensors = None
        if self._ranks.rank == self._source:
            assert self._path is not None
            tensors = checkpoints.open_tensors(self._path)
        for name, shape in shapes.items():
            value = torch.empty(shape, device=self._ranks.device)
            if tensors is not None:
                value.copy_(tensors.get_tensor(name))
            self._ranks.broadcast(value, self._source)
            yield name, value

    def _check_names_and_shapes(self, weights: dict[str, Tensor]) -> None:
        def differing() -> list[str]:
            assert self._path is not None
            tensors = checkpoints.open_tensors(self._path)
            names = {name for name in tensors.keys() if name.startswith("model/")}  # noqa: SIM118 not a dictionary
            wrong = sorted(names ^ weights.keys())
            return wrong + [
                name
                for name in sorted(names & weights.keys())
                if tensors.get_slice(name).get_shape() != list(weights[name].shape)
            ]

        if wrong := self._ranks.broadcast_object(differing, self._source):
            raise ValueError(
                f"the checkpoint does not fit the model: {counted(len(wrong), 'tensor')} of other names or shapes, "
                f"first {wrong[0]}; resume with the model section of the run's config.yaml, or choose another `out`"
            )

    def _check_same_on_all_ranks(self, identity: dict[str, Any]) -> None:
        checksums = self._ranks.all_gather_int(crc32c(json.dumps(identity, sort_keys=True).encode()))
        if len(set(checksums)) > 1:
            raise ValueError(
                f"ranks have different data or settings (checksums {checksums}), expected equal ones; every machine "
                "must see the same shards, pretrained weights and configuration"
            )


def choose_checkpoint(config: Config) -> tuple[Path | None, list[str]]:
    """Return the checkpoint on this machine that `train.resume` selects, or None, and the damage of each newer one.

    Raises: ValueError if `never` is set and there is an earlier run, or if the path is not an undamaged checkpoint.
    """
    newest = checkpoints.list_checkpoints(config.folder)[-1:]
    if config.train.resume == "never":
        if newest:
            raise ValueError(
                f"{config.out} holds an earlier run up to {newest[0].name}; choose another `out` or resume"
            )
        return None, []
    if config.train.resume == "auto":
        path, damages = checkpoints.newest_valid(config.folder)
        if damages and path is None:
            raise ValueError(
                f"all checkpoints of {config.out} are damaged: {damages[0]}; remove them to start from the beginning"
            )
        return path, damages
    return _choose_named(config, Path(config.train.resume))


def run_identity(config: Config, manifest_digest: str, model: nn.Module) -> dict[str, Any]:
    """Return the values that must stay the same when a run is resumed, by name.

    Checkpoints do not hold frozen parameters. The digest of these parameters shows if the backbone is another one.
    """
    values = config.model_dump(mode="json")
    return {
        MANIFEST: manifest_digest,
        "train.seed": config.train.seed,
        "data.global_batch_size": config.data.global_batch_size,
        **{f"data.{name}": values["data"][name] for name in ("background", "flips", "quarter_turns", "crop_px")},
        FROZEN: _frozen_digest(model),
        **{f"model.{name}": value for name, value in values["model"].items()},
    }


def check_identity(path: str, state: Mapping[str, Any], current: Mapping[str, Any], config: Config) -> None:
    """Compare the run identity in the state of a checkpoint with that of the current run.

    Raises: ValueError that names every difference.
    """
    saved = state["identity"]
    differing = [key for key, value in current.items() if saved.get(key) != value]
    if differing:
        explanations = {
            MANIFEST: _data_difference(state["config"]["data"]["train"], config.data.train),
            FROZEN: "the frozen weights differ (model.pretrained names another backbone, or its files have changed)",
        }
        texts = [explanations.get(key, f"{key}: {saved.get(key)} -> {current[key]}") for key in differing]
        raise ValueError(
            f"{path} belongs to another run ({'; '.join(texts)}); restore these values, or choose another `out`"
        )


def changed_values(saved: Mapping[str, Any], current: Mapping[str, Any]) -> str:
    """Return the changed configuration values as a text that follows "resumed"; empty if no value changed."""
    before, after = _flatten(saved), _flatten(current)
    differing = [f"{key} {before.get(key)} -> {after.get(key)}" for key in after if before.get(key) != after[key]]
    return f", with changed {', '.join(differing)}" if differing else ""


def _choose_named(config: Config, path: Path) -> tuple[Path | None, list[str]]:
    """Return the named checkpoint, a newer one of the same branch, or None if this machine does not have it."""
    if not path.exists():
        return None, []
    checkpoints.check(path)
    newest, damages = checkpoints.newest_valid(config.folder)
    if newest is None or newest.name <= path.name:
        return path, []
    if checkpoints.load_state(newest)["config"]["train"]["resume"] == config.train.resume:
        return newest, damages  # an earlier start of this branch wrote it
    raise ValueError(
        f"{config.out} continues to {newest.name} after {path.name}; remove the later checkpoints, or choose "
        "another `out` for this branch"
    )


def _data_difference(before: str, now: str) -> str:
    if before != now:
        return f"the training data differ: data.train: {before} -> {now}"
    return f"the training data differ: {now} was packed or indexed again"


def _flatten(config: Mapping[str, Any]) -> dict[str, Any]:
    sections = {name: value if isinstance(value, Mapping) else {"": value} for name, value in config.items()}
    return {f"{name}.{key}".rstrip("."): value for name, section in sections.items() for key, value in section.items()}


def _frozen_digest(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            digest.update(name.encode())
            digest.update(parameter.detach().contiguous().view(torch.uint8).cpu().numpy().data)
    return digest.hexdigest()
