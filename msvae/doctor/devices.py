"""The device of each rank, and in which precisions it computes."""

from __future__ import annotations

import contextlib
import platform
from typing import Any

import torch
from torch import nn

from msvae.distributed.precision import Precision, autocast
from msvae.distributed.setup import launched_precision
from msvae.doctor.patience import Found
from msvae.doctor.row import Facts, Row, extent, failed, listed, size
from msvae.doctor.scene import Scene

TF32_SINCE = (8, 0)
BF16_SINCE = (8, 0)
"""Compute capability of the first GPUs that have it (Ampere)."""
LITTLE_FREE = 0.8
"""Share of a GPU's memory that should be free before a run begins."""


def look(scene: Scene) -> Found:
    """Name, memory and versions of the device, and what computes on it."""
    device = scene.device
    found: dict[str, Any] = {"kind": device.type, "name": platform.processor() or platform.machine()}
    found["asked"] = launched_precision()
    found["computes"] = {name: _computes(name, device) for name in ("bf16", "fp16")}
    found["tf32"] = False
    if device.type == "cuda":
        free_bytes, total_bytes = torch.cuda.mem_get_info(device)
        capability = torch.cuda.get_device_capability(device)
        found |= {
            "name": torch.cuda.get_device_name(device),
            "index": device.index,
            "free_bytes": free_bytes,
            "total_bytes": total_bytes,
            "cuda": str(torch.version.cuda),
            "nccl": ".".join(map(str, torch.cuda.nccl.version())),  # type: ignore[no-untyped-call]
            "tf32": capability >= TF32_SINCE,
            "emulated": [] if capability >= BF16_SINCE else ["bf16"],
        }
    return found


def judge(facts: Facts) -> list[Row]:
    """Devices in one row, precisions in another."""
    if (
        row := failed("device", facts, "see whether `nvidia-smi` shows the GPU, and whether others use it")
    ) is not None:
        return [row]
    return [_device(facts), _precision(facts)]


def _device(facts: Facts) -> Row:
    kinds = sorted({f"{found['kind']} ({found['name']})" for found in facts})
    text = " and ".join(kinds)
    if any(found["kind"] != "cuda" for found in facts):
        if len({found["kind"] for found in facts}) > 1:
            lacking = [rank for rank, found in enumerate(facts) if found["kind"] != "cuda"]
            return Row("device", "fault", f"{text}; {listed(lacking)} without GPU", "mend the driver, or leave it out")
        return Row("device", "ok", text)
    free = extent([found["free_bytes"] for found in facts], size)
    text += f", {free} free; CUDA {facts[0]['cuda']}, NCCL {facts[0]['nccl']}"
    used = [rank for rank, found in enumerate(facts) if found["free_bytes"] < LITTLE_FREE * found["total_bytes"]]
    if used:
        return Row(
            "device", "warning", f"{text}; in use already on {listed(used)}", "end what else runs on these GPUs"
        )
    if len(kinds) > 1:
        return Row("device", "warning", text, "every step takes as long as the slowest GPU does: use GPUs of one kind")
    return Row("device", "ok", text)


def _precision(facts: Facts) -> Row:
    asked = facts[0]["asked"]
    able = [name for name in ("bf16", "fp16") if all(found["computes"][name] for found in facts)]
    able += ["tf32"] if all(found["tf32"] for found in facts) else []
    text = f"mixed precision {asked} is asked for; {', '.join(['float32', *able])} on all ranks"
    if len({found["asked"] for found in facts}) > 1:
        others = [rank for rank, found in enumerate(facts) if found["asked"] != asked]
        return Row("precision", "fault", f"{text}; another is asked for on {listed(others)}", "launch all alike")
    unable = [rank for rank, found in enumerate(facts) if asked != "no" and not found["computes"][asked]]
    if unable:
        return Row("precision", "fault", f"{text}; {listed(unable)} cannot", "launch with --mixed_precision no")
    emulated = [rank for rank, found in enumerate(facts) if asked in found.get("emulated", [])]
    if emulated:
        return Row(
            "precision", "warning", f"{text}; emulated on {listed(emulated)}", "fp16 is faster on these older GPUs"
        )
    return Row("precision", "ok", text)


def _computes(precision: Precision, device: torch.device) -> bool:
    """Whether a convolution, forward and backward, comes out finite."""
    layer, tiles = nn.Conv2d(4, 4, 3).to(device), torch.ones(1, 4, 8, 8, device=device)
    with contextlib.suppress(RuntimeError):
        with autocast(precision, device):
            total = layer(tiles).float().sum()
        total.backward()
        assert layer.weight.grad is not None
        return bool(torch.isfinite(layer.weight.grad).all())
    return False
