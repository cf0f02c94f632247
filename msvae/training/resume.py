"""Where a run begins: from nothing, or from a checkpoint that one rank can read and gives to all others.

So machines need no shared disk, and a checkpoint of any engine and world size serves any other.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from crc32c import crc32c
from torch import Tensor, nn

from msvae.config import Config
from msvae.distributed.collectives import Ranks
from msvae.messages import counted
from msvae.training import checkpoints as folder
from msvae.training.identity import changes, check_identity
from msvae.training.optim import AVERAGE
from msvae.training.parallel.trained_weights import Trained


class Start:
    """Found when it is made. `state` is that of the checkpoint, and None for a run that begins."""

    def __init__(self, config: Config, ranks: Ranks, identity: dict[str, Any]) -> None:
        self._ranks = ranks
        looks = ranks.is_main or ranks.is_local_main
        self._path, faults = ranks.run_on_all(lambda: choose(config) if looks else (None, []))
        steps = ranks.all_gather_int(0 if self._path is None else int(folder.load_state(self._path)["step"]))
        if config.train.resume not in ("auto", "never") and not any(steps):
            raise ValueError(f"{config.train.resume} is not a checkpoint that any machine has; name a folder step-…")
        self._source = steps.index(max(steps))
        found = ranks.broadcast_object(self._describe(config, faults), self._source)
        self.faults: list[str] = found["faults"]
        self.state: dict[str, Any] | None = found["state"]
        self._refuse_apart(identity)
        self.changes = ""
        if self.state is not None:
            check_identity(found["path"], self.state, identity, config)
            self.changes = changes(self.state["config"], config.model_dump(mode="json"))

    def _describe(self, config: Config, faults: list[str]) -> Callable[[], dict[str, Any]]:
        state = None if self._path is None else folder.load_state(self._path)
        path = str(self._path).replace(str(config.folder), str(config.out))
        return lambda: {"path": path, "state": state, "faults": faults}

    @property
    def step(self) -> int:
        """Finished steps."""
        return 0 if self.state is None else int(self.state["step"])

    def put_weights(self, model: nn.Module) -> None:
        """Give a model on every rank the weights of the checkpoint, before it is spread over them.

        Raises: ValueError when they are those of another model.
        """
        weights = {f"model/{name}": p.detach() for name, p in model.named_parameters() if p.requires_grad}
        self._refuse_unfit(weights)
        for name, value in self._tensors({name: weight.shape for name, weight in weights.items()}):
            weights[name].copy_(value)

    def put_moments(self, trained: Trained, kept: tuple[str, ...]) -> None:
        """Go on with the moments of the checkpoint; without an average in it, that begins at the weights."""
        assert self.state is not None
        trained.updates = self.state["updates"]
        kinds = [kind for kind in kept if kind != AVERAGE or self.state["averages"]]
        for kind in kinds:
            for name, value in self._tensors({f"{kind}/{name}": shape for name, shape in trained.shapes.items()}):
                trained.put(kind, name.removeprefix(f"{kind}/"), value)

    def _tensors(self, shapes: dict[str, torch.Size]) -> Iterator[tuple[str, Tensor]]:
        tensors = None
        if self._ranks.rank == self._source:
            assert self._path is not None
            tensors = folder.open_tensors(self._path)
        for name, shape in shapes.items():
            value = torch.empty(shape, device=self._ranks.device)
            if tensors is not None:
                value.copy_(tensors.get_tensor(name))
            self._ranks.broadcast(value, self._source)
            yield name, value

    def _refuse_unfit(self, weights: dict[str, Tensor]) -> None:
        def differing() -> list[str]:
            assert self._path is not None
            tensors = folder.open_tensors(self._path)
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

    def _refuse_apart(self, identity: dict[str, Any]) -> None:
        identities = self._ranks.all_gather_int(crc32c(json.dumps(identity, sort_keys=True).encode()))
        if len(set(identities)) > 1:
            raise ValueError(
                f"ranks would start apart, on data and settings {identities}; every machine must see the same shards, "
                "pretrained weights and configuration"
            )


def choose(config: Config) -> tuple[Path | None, list[str]]:
    """The checkpoint that `train.resume` asks for, or None to begin; and the faults of newer ones.

    Raises: ValueError when `never` meets an earlier run, or the path is not a whole checkpoint.
    """
    newest = folder.found(config.folder)[-1:]
    if config.train.resume == "never":
        if newest:
            raise ValueError(
                f"{config.out} holds an earlier run up to {newest[0].name}; choose another `out` or resume"
            )
        return None, []
    if config.train.resume == "auto":
        path, faults = folder.newest_whole(config.folder)
        if faults and path is None:
            raise ValueError(f"no checkpoint of {config.out} is whole: {faults[0]}; remove them to begin anew")
        return path, faults
    return _choose_named(config, Path(config.train.resume))


def _choose_named(config: Config, path: Path) -> tuple[Path | None, list[str]]:
    """None where this machine lacks it."""
    if not path.exists():
        return None, []
    folder.check(path)
    newest, faults = folder.newest_whole(config.folder)
    if newest is None or newest.name <= path.name:
        return path, []
    if folder.load_state(newest)["config"]["train"]["resume"] == config.train.resume:
        return newest, faults  # this branch has been begun before
    raise ValueError(
        f"{config.out} goes on to {newest.name} after {path.name}; remove the later checkpoints, or choose "
        "another `out` for this branch"
    )
