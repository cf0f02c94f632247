"""Compare msvae's losses (MSE, spectral angle, coverage), eager and compiled, to the formula of the specification.

python bench/losses.py

Each measurement is one forward and backward pass on one thread. Prints medians of ten rounds that take turns. The
limit is a copy that moves the same bytes: it reads both tensors and writes the gradient once. Memory is the peak that
one pass allocates in addition to the gradient.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import mse_loss
from torch.profiler import ProfilerActivity, profile

from msvae.losses.coverage import check_mask, mask_stats
from msvae.losses.spectra import error_and_angle

os.environ.setdefault("KINETO_LOG_LEVEL", "99")
SHAPES = ((4, 5, 512, 512), (16, 5, 256, 256))
ROUNDS = 10
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def specified_loss(original: Tensor, reconstructed: Tensor, mask: Tensor) -> Tensor:
    """Return the loss as specified: multiply by the mask, select spectra by boolean indexing, acos."""
    mask = (mask.expand(-1, original.shape[1], -1, -1) > 0.5).float()
    masked_original, masked_reconstructed = original * mask, reconstructed * mask
    mse_per_pixel = mse_loss(masked_reconstructed, masked_original, reduction="none")
    mse_per_channel = (mse_per_pixel * mask).sum(dim=(0, 2, 3)) / (mask.sum(dim=(0, 2, 3)) + 1e-8)
    magnitude = torch.norm(masked_original, dim=1, keepdim=True)
    valid = ((magnitude > 1e-6) & (mask[:, :1] > 0.5)).squeeze(1)
    u, v = masked_original.movedim(1, -1)[valid], masked_reconstructed.movedim(1, -1)[valid]
    cosine = (u * v).sum(dim=1) / (torch.norm(u, dim=1) * torch.norm(v, dim=1) + 1e-8)
    angle = torch.acos(cosine.clamp(-1 + 1e-6, 1 - 1e-6)).mean()
    coverage = mask.mean()
    return mse_per_channel.mean() + angle + 0 * coverage


def msvae_loss(original: Tensor, reconstructed: Tensor, mask: Tensor) -> Tensor:
    """Return the same loss from sums and counts, without indexing."""
    leaf_mask = check_mask(mask, original)
    error, angle = error_and_angle(reconstructed, original, leaf_mask)
    return error.overall() + angle.overall() + 0 * mask_stats(leaf_mask)["coverage"]


def seconds(loss: Loss, original: Tensor, reconstructed: Tensor, mask: Tensor) -> float:
    """Return the duration of one forward and backward pass."""
    reconstructed.grad = None
    began_s = time.perf_counter()
    loss(original, reconstructed, mask).backward()
    return time.perf_counter() - began_s


def copy_seconds(original: Tensor, reconstructed: Tensor, gradient: Tensor) -> float:
    """Return the duration of a pass that reads both tensors and writes one."""
    began_s = time.perf_counter()
    torch.add(original, reconstructed, out=gradient)
    return time.perf_counter() - began_s


def extra_copies(loss: Loss, original: Tensor, reconstructed: Tensor, mask: Tensor) -> float:
    """Return the peak of memory that one pass allocates in addition to the gradient, in copies of the input."""
    reconstructed.grad = None
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        loss(original, reconstructed, mask).backward()
    changes = [(e.start_ns(), e.nbytes()) for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for _, change in sorted(changes):
        held += change
        peak = max(peak, held)
    return peak / (original.numel() * original.element_size()) - 1


def main() -> None:
    """Measure in turns and print ratios for every shape."""
    torch.set_num_threads(1)
    contenders: dict[str, Loss] = {
        "specification": specified_loss,
        "msvae eager": msvae_loss,
        "msvae compiled": torch.compile(msvae_loss, fullgraph=True, dynamic=False),
    }
    for shape in SHAPES:
        generator = torch.Generator().manual_seed(0)
        original, reconstructed = (torch.rand(shape, generator=generator) for _ in range(2))
        mask = torch.rand(shape[0], 1, *shape[2:], generator=generator) > 0.5
        tensors = (original, reconstructed.requires_grad_(), mask)
        values = {name: float(loss(*tensors).detach()) for name, loss in contenders.items()}
        times: dict[str, list[float]] = {name: [] for name in (*contenders, "copy")}
        gradient = torch.empty_like(original)
        for _ in range(ROUNDS + 1):
            for name, loss in contenders.items():
                times[name].append(seconds(loss, *tensors))
            times["copy"].append(copy_seconds(original, reconstructed.detach(), gradient))
        medians = {name: statistics.median(series[1:]) for name, series in times.items()}
        print(f"{'x'.join(map(str, shape))}:")
        for name, loss in contenders.items():
            print(
                f"  {name:>14}: {medians['specification'] / medians[name]:5.2f}x the speed of the specification, "
                f"{medians[name] / medians['copy']:5.1f}x the time of the copy, "
                f"{extra_copies(loss, *tensors):.2f} extra copies of the input, value {values[name]:.6f}"
            )


if __name__ == "__main__":
    main()
