"""Compare a training step of an SD3-size VAE to a step of a plain loop on the same machine in the same run.

python bench/step.py [--px 128] [--batch 2] [--full] [--rounds 3] [--steps 3] [--precision no|bf16] [--variants …]

Every measurement runs in a new process, and variants take turns in every round. Prints medians as ratios to the plain
loop. Memory is the peak, without the memory of the imported libraries: of the process on a CPU, of the allocator on a
GPU. MFU is the share of the measured rate of one large matrix product in the precision of the row. `output` has no
MFU, because it skips a part of the operations. A variant that ends in `tcmalloc` uses that allocator (Debian's
libtcmalloc-minimal4). It is left out if the allocator is not installed.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from ctypes.util import find_library
from pathlib import Path
from typing import Any

import torch
from steps import ours, plain

BANDS, WIDTH = 5, 32
SD3: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 16,
    "norm_num_groups": 32,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
NAMES = (
    "plain loop",
    *ours.VARIANTS,
    "channels-last compiled",
    "checkpointing output",
    "plain loop tcmalloc",
    "eager tcmalloc",
    "checkpointing tcmalloc",
)
TCMALLOC = find_library("tcmalloc_minimal")
Figures = dict[str, float]


def measure(name: str, arguments: argparse.Namespace) -> Figures:
    """Measure seconds per step and peak memory, in this process."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    tiles = torch.rand(arguments.batch, BANDS, arguments.px, arguments.px, device=device)
    leaf_mask = torch.rand(arguments.batch, 1, arguments.px, arguments.px, device=device) > 0.4
    before = _peak_bytes(device)
    if name.startswith("plain loop"):
        step: Any = plain.make_step(SD3, BANDS, WIDTH, arguments.full, device)
    else:
        step = ours.make_step(SD3, name.split(), WIDTH, arguments.full, device, arguments.precision, arguments.batch)
    step(tiles, leaf_mask)
    times_s = []
    for _ in range(arguments.steps):
        began_s = time.perf_counter()
        step(tiles, leaf_mask)
        if device.type == "cuda":
            torch.cuda.synchronize()
        times_s.append(time.perf_counter() - began_s)
    return {"step_s": statistics.median(times_s), "memory_gb": (_peak_bytes(device) - before) / 1e9}


def flop(full: bool, px: int, batch: int) -> float:
    """Count the floating-point operations of a forward and backward pass of the plain model, on no device."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        model = plain.PlainVae(SD3, BANDS, WIDTH)
        model.vae.requires_grad_(full)
        images = torch.empty(batch, BANDS, px, px)
        with FlopCounterMode(display=False) as counter:
            latents = model.vae.encode(model.before(images)).latent_dist.mode()
            model.after(model.vae.decode(latents).sample).sum().backward()
    return float(counter.get_total_flops())


def matrix_product_flops(precision: str) -> float:
    """Measure the FLOP/s of one large matrix product."""
    # convolutions may use TF32 by default, so the product may, too
    torch.backends.cuda.matmul.allow_tf32 = True
    on_gpu = torch.cuda.is_available()
    side = 8192 if on_gpu else 2048
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a = torch.randn(side, side, dtype=dtype, device="cuda" if on_gpu else "cpu")
    a @ a
    times_s = []
    for _ in range(5):
        if on_gpu:
            torch.cuda.synchronize()
        began_s = time.perf_counter()
        a @ a
        if on_gpu:
            torch.cuda.synchronize()
        times_s.append(time.perf_counter() - began_s)
    return 2 * side**3 / statistics.median(times_s)


def _peak_bytes(device: torch.device) -> float:
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def in_new_process(name: str) -> Figures:
    """Return the figures that `--only` prints. Raises: RuntimeError with the last line of its error."""
    allocator = {"LD_PRELOAD": TCMALLOC} if TCMALLOC and name.endswith("tcmalloc") else {}
    child = subprocess.run(
        [sys.executable, Path(__file__), *sys.argv[1:], "--only", name],
        capture_output=True, text=True, env=os.environ | allocator,
    )  # fmt: skip
    if child.returncode:
        raise RuntimeError((child.stderr.strip().splitlines() or [f"exit code {child.returncode}"])[-1])
    figures: Figures = json.loads(child.stdout.splitlines()[-1])
    return figures


def main() -> None:
    """Measure in turns and print one row per variant."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--px", type=int, default=128)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--full", action="store_true", help="train the backbone, too")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--precision", choices=("no", "bf16"), default="no")
    parser.add_argument("--variants", nargs="+", default=NAMES)
    parser.add_argument("--only", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only:
        print(json.dumps(measure(arguments.only, arguments)))
        return
    rounds: dict[str, list[Figures]] = {
        name: [] for name in ("plain loop", *arguments.variants) if TCMALLOC or not name.endswith("tcmalloc")
    }
    if not TCMALLOC:
        print("tcmalloc is not installed: its variants are left out", file=sys.stderr)
    rates: dict[str, list[float]] = {"no": [], arguments.precision: []}
    for _ in range(arguments.rounds):
        for precision, found in rates.items():
            found.append(matrix_product_flops(precision))
        for name in rounds:
            rounds[name].append(in_new_process(name))
    operations = flop(arguments.full, arguments.px, arguments.batch)
    medians = {
        name: {key: statistics.median(figures[key] for figures in found) for key in found[0]}
        for name, found in rounds.items()
    }
    base = medians["plain loop"]
    kind = "full" if arguments.full else "frozen backbone"
    print(f"{kind}, {arguments.batch} x {BANDS} x {arguments.px} x {arguments.px}, precision {arguments.precision}")
    print(f"{'':>24} {'time':>14} {'memory':>16} {'images/s':>9} {'MFU':>5}")
    for name, figures in medians.items():
        peak = statistics.median(rates["no" if name.startswith("plain loop") else arguments.precision])
        mfu = "-" if "output" in name else f"{operations / figures['step_s'] / peak:.2f}"
        print(
            f"{name:>24} {figures['step_s'] / base['step_s']:5.2f}x {figures['step_s']:6.2f}s "
            f"{figures['memory_gb'] / base['memory_gb']:6.2f}x {figures['memory_gb']:6.2f}GB "
            f"{arguments.batch / figures['step_s']:9.2f} {mfu:>5}"
        )


if __name__ == "__main__":
    main()
