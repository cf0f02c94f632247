"""One training step with placement `output` and a frozen encoder, against the same model whose encoder keeps a graph.

python bench/frozen_encoder.py; a backbone of the SD3 VAE's shape at half its width, 2 x 5 x 128 x 128, one thread,
medians of five rounds that take turns. Memory is what autograd keeps of one forward pass, parameters left out.
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
    """One forward and backward pass."""
    began_s = time.perf_counter()
    losses = model(sample=sample)[1]
    (losses["mse"] + losses["sam"]).backward()
    return time.perf_counter() - began_s


def kept_bytes(model: AutoencoderKLMultispectralAdapter, sample: torch.Tensor) -> int:
    """What one forward pass keeps for its backward pass."""
    own = {parameter.data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in own:
            kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(sample=sample)
    return sum(kept.values())


def main() -> None:
    """Print ratios."""
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
        memory = kept_bytes(frozen, sample) / kept_bytes(graphed, sample)
        print(f"training {trained}: {share:.2f} of the time and {memory:.2f} of the memory of an encoder with a graph")


if __name__ == "__main__":
    main()
