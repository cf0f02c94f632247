"""What a check may know: the configuration, if one was given, and where this rank stands."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass

import torch

from msvae.config import Config


@dataclass(frozen=True)
class Scene:
    """Of one rank. `joined` is 1 where the ranks never met; then each looks at itself alone."""

    config: Config | None
    joined: int
    device: torch.device

    @property
    def rank(self) -> int:
        """As the launcher counts."""
        return int(os.environ.get("RANK", 0))

    @property
    def local_rank(self) -> int:
        """Among the ranks of this machine."""
        return int(os.environ.get("LOCAL_RANK", 0))

    @property
    def ranks_here(self) -> int:
        """Ranks that the launcher started on this machine."""
        return int(os.environ.get("LOCAL_WORLD_SIZE", 1))

    @property
    def host(self) -> str:
        """Name of this machine."""
        return socket.gethostname()
