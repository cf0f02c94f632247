"""Fixtures: a small backbone, leaf statistics, tiles, and models around the backbone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from msvae import AutoencoderKLMultispectralAdapter
from msvae.bands import LeafStatistics
from msvae.model.build import TINY_BACKBONE

PLACEMENTS = ("both", "input", "output")


@pytest.fixture(scope="session")
def backbone_folder(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("backbone") / "vae"
    AutoencoderKL(**TINY_BACKBONE).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def statistics() -> LeafStatistics:
    return leaf_statistics([0.05, 0.12, 0.07, 0.35, 0.45])


def leaf_statistics(mean: list[float]) -> LeafStatistics:
    mixing = np.random.default_rng(0).normal(size=(len(mean), 5)) * 0.05
    covariance = mixing @ mixing.T + 1e-4 * np.eye(len(mean))
    return LeafStatistics(
        num_pixels=1000,
        mean=mean,
        std=np.sqrt(np.diag(covariance)).tolist(),
        minimum=[0.0] * len(mean),
        maximum=[1.0] * len(mean),
        covariance=covariance.tolist(),
    )


def leaf_tiles(batch: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return torch.rand(batch, 5, 32, 32, generator=generator), torch.rand(batch, 1, 32, 32, generator=generator) > 0.5


def load(folder: Path, **options: object) -> AutoencoderKLMultispectralAdapter:
    torch.manual_seed(1)
    return AutoencoderKLMultispectralAdapter.from_pretrained(folder, **options)


def randomise_new_parts(model: AutoencoderKLMultispectralAdapter) -> None:
    """Set convolutions of adapters and attention, which start at zero, to random values."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "attention.gate" in name or ("_adapter." in name and "linear" not in name):
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def assert_same_weights(model: AutoencoderKLMultispectralAdapter, other: AutoencoderKLMultispectralAdapter) -> None:
    ours, theirs = model.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
