"""Checkpoints: tensors in safetensors, the rest in JSON, written whole or not at all, by the main process.

Everything random in a run is a function of (seed, step, sample), so no generator state needs keeping.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from msvae.config import Config
from msvae.engine.optim import MovingAverage
from msvae.model.autoencoder import AutoencoderKLMultispectralAdapter
from msvae.wording import counted

FOLDER = "checkpoints"
TENSORS, STATE = "tensors.safetensors", "state.json"
MOMENTS = ("step", "exp_avg", "exp_avg_sq")
MANIFEST, FROZEN = "manifest_digest", "frozen_parameters"
"""Digests among what identifies a run: they tell that something differs, not what."""
LIBRARIES = ("msvae", "torch", "accelerate", "diffusers", "numpy")


class TrainedState:
    """The tensors that training changes: parameters, their moving averages and AdamW's moments, by name."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, average: MovingAverage) -> None:
        self._named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._optimizer, self._average = optimizer, average

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor under `model/NAME`, `average/NAME` or `optimizer/MOMENT/NAME`."""
        tensors = self._weights()
        for name, parameter in self._named.items():
            tensors |= {f"optimizer/{m}/{name}": self._optimizer.state[parameter][m] for m in MOMENTS}
        return tensors

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor], path: Path) -> None:
        """Put saved tensors in place.

        Raises: ValueError when they are not those of this model and optimizer.
        """
        weights = self._weights()
        expected = {*weights, *(f"optimizer/{m}/{name}" for m in MOMENTS for name in self._named)}
        wrong = sorted(expected ^ set(tensors))
        wrong += [name for name in weights if name in tensors and weights[name].shape != tensors[name].shape]
        if wrong:
            raise ValueError(
                f"{path} does not fit the model: {counted(len(wrong), 'tensor')} of other names or shapes, first "
                f"{wrong[0]}; resume with the model section of the run's config.yaml, or choose another `out`"
            )
        for name, weight in weights.items():
            weight.copy_(tensors[name])
        groups = self._optimizer.state_dict()["param_groups"]
        names = {parameter: name for name, parameter in self._named.items()}
        stepped = [names[parameter] for group in self._optimizer.param_groups for parameter in group["params"]]
        moments = {i: {m: tensors[f"optimizer/{m}/{name}"] for m in MOMENTS} for i, name in enumerate(stepped)}
        self._optimizer.load_state_dict({"state": moments, "param_groups": groups})

    def _weights(self) -> dict[str, Tensor]:
        averages = dict(zip(self._named, self._average.values, strict=False))
        return {
            **{f"model/{name}": parameter.detach() for name, parameter in self._named.items()},
            **{f"average/{name}": value for name, value in averages.items()},
        }


def save(out: Path, step: int, trained: TrainedState, state: Mapping[str, Any], keep: int) -> Path:
    """Write `out/checkpoints/step-…` under a temporary name, rename it, drop all but the newest `keep`."""
    final = out / FOLDER / f"step-{step:08d}"
    for leftover in final.parent.glob(".step-*"):
        shutil.rmtree(leftover)
    partial = final.with_name(f".{final.name}.partial")
    partial.mkdir(parents=True)
    save_file({name: tensor.contiguous().cpu() for name, tensor in trained.tensors().items()}, partial / TENSORS)
    (partial / STATE).write_text(json.dumps({"step": step, "versions": _versions(), **state}, indent=1) + "\n")
    _put_in_place(partial, final)
    for old in found(out)[:-keep]:
        shutil.rmtree(old)
    return final


def found(out: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    return sorted((out / FOLDER).glob("step-*"))


def load_state(path: Path) -> dict[str, Any]:
    """What a checkpoint says of itself.

    Raises: ValueError when `path` is not a checkpoint.
    """
    if not (path / STATE).is_file() or not (path / TENSORS).is_file():
        raise ValueError(f"{path} is not a checkpoint: it lacks {STATE} or {TENSORS}; name a folder step-…")
    try:
        state: dict[str, Any] = json.loads((path / STATE).read_text())
    except ValueError as error:
        raise ValueError(f"{path / STATE} is damaged ({error}); remove {path} to go on from the one before") from error
    return state


def restore(path: Path, trained: TrainedState) -> None:
    """Put the tensors of a checkpoint in place.

    Raises: ValueError when the file is damaged or of another model.
    """
    try:
        tensors = load_file(path / TENSORS)
    except SafetensorError as error:
        raise ValueError(
            f"{path / TENSORS} is damaged ({error}); remove {path} to go on from the one before"
        ) from error
    trained.restore(tensors, path)


def save_model(model: AutoencoderKLMultispectralAdapter, folder: Path) -> None:
    """Write a model in diffusers format, whole or not at all."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    _put_in_place(partial, folder)


def choose(config: Config) -> Path | None:
    """The checkpoint that `train.resume` asks for, or None to begin.

    Raises: ValueError when `never` meets an earlier run, or the path is not a checkpoint.
    """
    newest = found(config.out)[-1:]
    if config.train.resume == "never":
        if newest:
            raise ValueError(
                f"{config.out} holds an earlier run up to {newest[0].name}; choose another `out` or resume"
            )
        return None
    if config.train.resume == "auto":
        return newest[0] if newest else None
    path = Path(config.train.resume)
    load_state(path)
    if newest and path.resolve().parent == newest[0].resolve().parent and path.name != newest[0].name:
        raise ValueError(
            f"{config.out} goes on to {newest[0].name} after {path.name}; remove the later checkpoints, or choose "
            "another `out` for this branch"
        )
    return path


def identity(config: Config, manifest_digest: str, model: nn.Module) -> dict[str, Any]:
    """What must stay the same for a resumed run to be the same run, key by key.

    Frozen parameters are no part of a checkpoint: their digest tells when the backbone is another one.
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


def check_identity(path: Path, state: Mapping[str, Any], current: Mapping[str, Any], config: Config) -> None:
    """Compare the identity in the state of a checkpoint with that of the run at hand.

    Raises: ValueError naming each thing that differs.
    """
    saved = state["identity"]
    differing = [key for key, value in current.items() if saved.get(key) != value]
    told = {
        MANIFEST: _data_that_differ(state["config"]["data"]["train"], config.data.train),
        FROZEN: "the frozen weights differ (model.pretrained names another backbone, or its files have changed)",
    }
    if differing:
        texts = [told.get(key, f"{key}: {saved.get(key)} -> {current[key]}") for key in differing]
        raise ValueError(
            f"{path} belongs to another run ({'; '.join(texts)}); put these back, or choose another `out`"
        )


def _data_that_differ(before: str, now: str) -> str:
    if before != now:
        return f"the training data differ: data.train: {before} -> {now}"
    return f"the training data differ: {now} was packed or indexed anew since"


def changes(saved: Mapping[str, Any], current: Mapping[str, Any]) -> str:
    """What of the configuration is not as it was, to be said after "resumed"; empty when nothing is."""
    before, after = _flat(saved), _flat(current)
    differing = [f"{key} {before.get(key)} -> {after.get(key)}" for key in after if before.get(key) != after[key]]
    return f", with changed {', '.join(differing)}" if differing else ""


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    sections = {name: value if isinstance(value, Mapping) else {"": value} for name, value in config.items()}
    return {f"{name}.{key}".rstrip("."): value for name, section in sections.items() for key, value in section.items()}


def _frozen_digest(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            digest.update(name.encode())
            digest.update(parameter.detach().contiguous().view(torch.uint8).cpu().numpy().data)
    return digest.hexdigest()


def _put_in_place(partial: Path, final: Path) -> None:
    """Rename a folder once its content is on the disk. What stood there before is moved aside until then."""
    for file in (*partial.iterdir(), partial):
        _flush_to_disk(file)
    old = final.with_name(f".{final.name}.old")
    if final.exists():
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
    partial.rename(final)
    _flush_to_disk(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def _versions() -> dict[str, str]:
    return {library: importlib.metadata.version(library) for library in LIBRARIES}


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
