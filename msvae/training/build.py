"""The model of a run as it is trained, and as it is judged and saved."""

from __future__ import annotations

import copy

import torch
from torch import nn

from msvae.config import Config
from msvae.distributed.collectives import Ranks
from msvae.model.autoencoder import AutoencoderKLMultispectralAdapter
from msvae.model.build import build_model
from msvae.shards.manifest import Manifest
from msvae.training.optim import AVERAGE
from msvae.training.parallel.trained_weights import Trained


def build(config: Config, manifest: Manifest, ranks: Ranks) -> AutoencoderKLMultispectralAdapter:
    """The model on this rank's device, in the form that it is trained in, not yet compiled.

    Raises: ValueError when it could not be compiled.
    """
    if config.train.compile and ranks.engine.shards_weights:
        raise ValueError(
            "train.compile is true under ZeRO 3, whose weights come and go between layers; expected DDP, ZeRO 1 or 2: "
            "use zero2.yaml, or leave train.compile out"
        )
    with ranks.engine.local_main_first():
        model = build_model(
            config.model, config.loss, config.data.background, manifest.bands, manifest.statistics, config.train.seed
        )
    if config.train.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    # DeepSpeed lays weights end to end; there the tiles alone are channels last, and what is made of them follows
    if config.train.channels_last and not ranks.engine.uses_deepspeed:
        model.to(memory_format=torch.channels_last)
    model.to(ranks.device).train()
    return model


class EvaluationModel:
    """A whole copy of the model on every rank, however training spreads its own: averaged where there is an average.

    It is for evaluation and saving. Frozen weights are not copied, unless it rests in the machine's own memory, as it
    does where ranks have no room for a whole model.
    """

    def __init__(self, model: AutoencoderKLMultispectralAdapter, averages: bool, rests_on_cpu: bool) -> None:
        self._device, self._rests_on_cpu = model.device, rests_on_cpu
        frozen: dict[int, object] = {id(p): _alias(p) for p in model.parameters() if not p.requires_grad}
        self.model: AutoencoderKLMultispectralAdapter = copy.deepcopy(model, frozen).eval().requires_grad_(False)
        self.model.disable_gradient_checkpointing()
        own = dict(self.model.named_parameters())
        self._weights = {name: own[name] for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.averages = averages
        self.rest()

    def follow(self, trained: Trained) -> AutoencoderKLMultispectralAdapter:
        """The model with the weights of now, on this rank's device. All ranks."""
        self.model.to(self._device)
        with torch.no_grad():
            for name, value in trained.values(AVERAGE if self.averages else "model"):
                self._weights[name].copy_(value)
        return self.model

    def rest(self) -> None:
        """It is not needed for a while."""
        if self._rests_on_cpu:
            self.model.to("cpu")


def _alias(parameter: nn.Parameter) -> nn.Parameter:
    """Another parameter on the same memory: DeepSpeed's stage 3 takes the memory away from the first."""
    return nn.Parameter(parameter.detach(), requires_grad=False)
