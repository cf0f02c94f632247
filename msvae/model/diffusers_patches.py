"""Gradient checkpointing by residual block: a backward pass holds the inside of one of them at a time."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.resnet import ResnetBlock2D
from torch import nn
from torch.utils.checkpoint import checkpoint


class RecomputesResiduals(ModelMixin):  # type: ignore[misc]
    """A model whose residual blocks can be computed again in the backward pass.

    diffusers computes its up and down blocks again, of three residual blocks and more each: the same time, and over
    twice the memory.
    """

    def enable_gradient_checkpointing(self) -> None:
        """Keep only the inputs of residual blocks for the backward pass."""
        for block in self._residual_blocks():
            block.forward = partial(checkpoint, type(block).forward.__get__(block), use_reentrant=False)

    def disable_gradient_checkpointing(self) -> None:
        """Keep everything that a backward pass needs, again."""
        for block in self._residual_blocks():
            vars(block).pop("forward", None)

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether residual blocks are computed again."""
        return any("forward" in vars(block) for block in self._residual_blocks())

    def _residual_blocks(self) -> Iterator[nn.Module]:
        return (module for module in self.modules() if isinstance(module, ResnetBlock2D))
