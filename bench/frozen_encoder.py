"""Compare a training step whose frozen encoder has no autograd graph to one whose encoder has a graph.

python bench/frozen_encoder.py

Adapters are at the output only. The backbone has the shape of the SD3 VAE at half its width; the batch is
2 x 5 x 128 x 128; one thread. Prints medians of five rounds that take turns. Memory is what autograd saves in one
forward pass, without parameters.
"""

from __future__ import annotations

import statistics
import time

import torch

from msvae import AutoencoderKLMultispectralAdapter
from msvae.model.build import TINY_BACKBONE

ROUNDS = 5
HALF_SD3 = {**TINY_BACKBONE, "block_out_channels": (64, 128, 256, 256), "layers_per_block": 2, "norm_num_groups": 32}


def seconds(model: AutoencoderKLMultispectralAdapter, sample: torch.Tensor) -> float:
    """Return the duration of one forward and backward pass."""
    began_s = time.perf_counter()
    losses = model(sample=sample)[1]
    (losses["mse"] + losses["sam"]).backward()
    return time.perf_counter() - began_s


def saved_bytes(model: AutoencoderKLMultispectralAdapter, sample: torch.Tensor) -> int:
    """Return the size of all tensors that one forward pass saves for its backward pass."""
    own = {parameter.data_ptr() for parameter in model.parameters()}
    saved: dict[int, int] = {}

    def save(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in own:
            saved[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        model(sample=sample)
    return sum(saved.values())


def main() -> None:
    """Measure in turns and print ratios."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    sample = torch.rand(2, 5, 128, 128)
    for trained, with_decoder in (("adapters", False), ("adapters and decoder", True)):
        frozen, graphed = (AutoencoderKLMultispectralAdapter(**HALF_SD3, adapter_placement="output") for _ in range(2))
        for model in (frozen, graphed):
            model.freeze_backbone()
            model.decoder.requires_grad_(with_decoder)
        graphed.encoder.conv_in.requires_grad_(True)
        times = [(seconds(frozen, sample), seconds(graphed, sample)) for _ in range(ROUNDS + 1)][1:]
        share = statistics.median(f for f, _ in times) / statistics.median(g for _, g in times)
        memory = saved_bytes(frozen, sample) / saved_bytes(graphed, sample)
        print(f"training {trained}: {share:.2f} of the time and {memory:.2f} of the memory of an encoder with a graph")


if __name__ == "__main__":
    main()
