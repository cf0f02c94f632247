"""Checks of each machine: devices and precisions, cores, shared memory, open files, and free disk space."""

from __future__ import annotations

import contextlib
import os
import platform
import resource
import shutil
import tempfile
import uuid
from pathlib import Path
from typing import Any

import torch
from torch import nn

from msvae.config import Config
from msvae.distributed.precision import Precision, autocast
from msvae.distributed.setup import check_writable, launched_precision, nearest_existing
from msvae.doctor.inputs import FEW_RETRIES, FLOAT_BYTES, parameter_counts
from msvae.doctor.row import Context, Facts, Level, OwnFacts, Row, failed, list_ranks, size, value_range
from msvae.messages import counted
from msvae.shards.stores.remote import WritableStore

TF32_SINCE = (8, 0)
BF16_SINCE = (8, 0)
"""Compute capability of the first GPUs with this precision (Ampere)."""
FREE_SHARE = 0.8
"""Share of a GPU's memory that should be free before a run begins."""

SHARED_MEMORY = Path("/dev/shm")
NCCL_BYTES_PER_RANK = 64 * 2**20
"""Shared memory that NCCL may use per rank, in bytes. A container has 64 MB for all ranks by default."""
OPEN_FILES = 1024
"""Open files that a rank may need: 256 shards, 256 indexes, sockets to other ranks, and libraries."""

TEMPORARY_BYTES = 10**9
"""Free space that TMPDIR should have, in bytes."""
CHECKPOINT_COPIES = 4
"""Copies of the trained parameters in a checkpoint: weights, two moments and the moving average."""
EXTRA_CHECKPOINTS = 2
"""Checkpoints in addition to `train.keep_checkpoints`: the one with the lowest loss, and one being written."""
MODEL_COPIES = 4
"""Saved models: `untrained`, `best`, `model`, and one that is being written."""


def collect_device(context: Context) -> OwnFacts:
    """Return name, memory and versions of the device, and the precisions in which it computes."""
    device = context.device
    facts: dict[str, Any] = {"kind": device.type, "name": platform.processor() or platform.machine()}
    facts["requested"] = launched_precision()
    facts["computes"] = {name: _computes(name, device) for name in ("bf16", "fp16")}
    facts["tf32"] = False
    if device.type == "cuda":
        free_bytes, total_bytes = torch.cuda.mem_get_info(device)
        capability = torch.cuda.get_device_capability(device)
        facts |= {
            "name": torch.cuda.get_device_name(device),
            "free_bytes": free_bytes,
            "total_bytes": total_bytes,
            "cuda": str(torch.version.cuda),
            "nccl": ".".join(map(str, torch.cuda.nccl.version())),  # type: ignore[no-untyped-call]
            "tf32": capability >= TF32_SINCE,
            "emulated": [] if capability >= BF16_SINCE else ["bf16"],
        }
    return facts


def check_device(facts: Facts) -> list[Row]:
    """Return the rows `device` and `precision`."""
    advice = "check that `nvidia-smi` shows the GPU, and that no other process uses it"
    if (row := failed("device", facts, advice)) is not None:
        return [row]
    return [_check_device(facts), _check_precision(facts)]


def collect_machine(context: Context) -> OwnFacts:
    """Return the cores, threads, memory and open files that this rank may use."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    memory = shutil.disk_usage(SHARED_MEMORY) if SHARED_MEMORY.is_dir() else None
    return {
        "cores": len(os.sched_getaffinity(0)),
        "local_world_size": context.local_world_size,
        "threads": torch.get_num_threads(),
        "readers": 0 if context.config is None else context.config.data.num_workers,
        "on_gpu": context.device.type == "cuda",
        "open_files": soft,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "shared_free_bytes": 0 if memory is None else memory.free,
    }


def check_machine(facts: Facts) -> list[Row]:
    """Return the rows `cores`, `shared memory` and `open files`."""
    if (row := failed("machine", facts, "")) is not None:
        return [row]
    return [_check_cores(facts), _check_shared_memory(facts), _check_open_files(facts)]


def collect_disks(context: Context) -> OwnFacts:
    """Return the free bytes of TMPDIR, `out` and `data.cache`.

    This function writes to `out` as a run does, and removes what it wrote.
    """
    folders = {"TMPDIR": Path(tempfile.gettempdir())}
    if (config := context.config) is not None:
        folders["out"] = config.folder
        if config.data.cache is not None:
            folders["data.cache"] = config.data.cache
        check_writable(config.folder)
        if config.out_is_url and not context.rank:
            _check_store_writable(config.out)
    return {
        name: {"folder": str(folder), "free_bytes": shutil.disk_usage(nearest_existing(folder)).free}
        for name, folder in folders.items()
    }


def check_disks(facts: Facts, model_facts: Facts, config: Config | None) -> list[Row]:
    """Return one row per folder. The space needed in `out` follows from the size of the model, if it is known."""
    advice = "choose another `out`, TMPDIR or data.cache, or fix its permissions"
    if (row := failed("disk", facts, advice)) is not None:
        return [row]
    needed = {"TMPDIR": TEMPORARY_BYTES, "out": 0}
    if config is not None:
        needed["out"] = _run_bytes(config, model_facts)
        needed["data.cache"] = int(config.data.cache_gb * 1e9)
    return [_check_disk(name, [own[name] for own in facts], needed[name], config) for name in facts[0]]


def _check_device(facts: Facts) -> Row:
    kinds = sorted({f"{own['kind']} ({own['name']})" for own in facts})
    text = " and ".join(kinds)
    if any(own["kind"] != "cuda" for own in facts):
        if len({own["kind"] for own in facts}) > 1:
            lacking = [rank for rank, own in enumerate(facts) if own["kind"] != "cuda"]
            advice = "repair the driver of that machine, or leave the machine out"
            return Row("device", "fault", f"{text}; no GPU on {list_ranks(lacking)}", advice)
        return Row("device", "ok", text)
    free = value_range([own["free_bytes"] for own in facts], size)
    text += f", {free} free; CUDA {facts[0]['cuda']}, NCCL {facts[0]['nccl']}"
    used = [rank for rank, own in enumerate(facts) if own["free_bytes"] < FREE_SHARE * own["total_bytes"]]
    if used:
        advice = "end the other processes on these GPUs"
        return Row("device", "warning", f"{text}; already in use on {list_ranks(used)}", advice)
    if len(kinds) > 1:
        return Row("device", "warning", text, "use GPUs of one kind: every step waits for the slowest GPU")
    return Row("device", "ok", text)


def _check_precision(facts: Facts) -> Row:
    requested = facts[0]["requested"]
    able = [name for name in ("bf16", "fp16") if all(own["computes"][name] for own in facts)]
    able += ["tf32"] if all(own["tf32"] for own in facts) else []
    text = f"mixed precision {requested} is requested; all ranks compute in {', '.join(['float32', *able])}"
    if len({own["requested"] for own in facts}) > 1:
        others = [rank for rank, own in enumerate(facts) if own["requested"] != requested]
        advice = "launch all ranks with the same --mixed_precision"
        return Row("precision", "fault", f"{text}; {list_ranks(others)} requested another precision", advice)
    unable = [rank for rank, own in enumerate(facts) if requested != "no" and not own["computes"][requested]]
    if unable:
        advice = "launch with --mixed_precision no"
        return Row("precision", "fault", f"{text}; {list_ranks(unable)} cannot compute in {requested}", advice)
    emulated = [rank for rank, own in enumerate(facts) if requested in own.get("emulated", [])]
    if emulated:
        advice = "use fp16, which is faster on these older GPUs"
        return Row("precision", "warning", f"{text}; emulated on {list_ranks(emulated)}", advice)
    return Row("precision", "ok", text)


def _computes(precision: Precision, device: torch.device) -> bool:
    """Check that forward and backward pass of a convolution are finite in this precision."""
    layer, tiles = nn.Conv2d(4, 4, 3).to(device), torch.ones(1, 4, 8, 8, device=device)
    with contextlib.suppress(RuntimeError):
        with autocast(precision, device):
            total = layer(tiles).float().sum()
        total.backward()
        assert layer.weight.grad is not None
        return bool(torch.isfinite(layer.weight.grad).all())
    return False


def _check_cores(facts: Facts) -> Row:
    cores = value_range([own["cores"] for own in facts], lambda number: f"{number:.0f}")
    threads = value_range([own["threads"] for own in facts], lambda number: counted(int(number), "thread"))
    memory = value_range([own["memory_bytes"] for own in facts], size)
    ranks = counted(facts[0]["local_world_size"], "rank")
    text = f"{cores} cores for {ranks} per machine, {threads} per rank, {memory} of memory"
    crowded = [rank for rank, own in enumerate(facts) if own["threads"] * own["local_world_size"] > own["cores"]]
    if crowded:
        fair = max(1, facts[crowded[0]]["cores"] // facts[crowded[0]]["local_world_size"])
        advice = f"set OMP_NUM_THREADS={fair}"
        return Row("cores", "warning", f"{text}: more threads than cores on {list_ranks(crowded)}", advice)
    starved = [
        rank
        for rank, own in enumerate(facts)
        if own["on_gpu"] and (1 + own["readers"]) * own["local_world_size"] > own["cores"]
    ]
    if starved:
        readers = counted(facts[starved[0]]["readers"], "reader")
        return Row(
            "cores",
            "warning",
            f"{text}; with {readers} per rank, no core is left over on {list_ranks(starved)}",
            "lower data.num_workers, or ask the scheduler for more cores (--cpus-per-task)",
        )
    return Row("cores", "ok", text)


def _check_shared_memory(facts: Facts) -> Row:
    free = [own["shared_free_bytes"] for own in facts]
    text = f"{value_range(free, size)} free in {SHARED_MEMORY}"
    short = [
        rank
        for rank, own in enumerate(facts)
        if own["on_gpu"]
        and own["local_world_size"] > 1
        and own["shared_free_bytes"] < NCCL_BYTES_PER_RANK * own["local_world_size"]
    ]
    if short:
        advice = "start the container with more shared memory, such as docker run --shm-size 8g"
        return Row("shared memory", "warning", f"{text}: too little for NCCL on {list_ranks(short)}", advice)
    return Row("shared memory", "ok", text)


def _check_open_files(facts: Facts) -> Row:
    limits = [own["open_files"] for own in facts]
    text = f"{value_range(limits, lambda number: f'{number:,.0f}')} open files per process"
    short = [rank for rank, limit in enumerate(limits) if limit != resource.RLIM_INFINITY and limit < OPEN_FILES]
    if short:
        advice = "run `ulimit -n 4096` before the launch"
        return Row("open files", "warning", f"{text}: too few on {list_ranks(short)}", advice)
    return Row("open files", "ok", text.replace(f"{resource.RLIM_INFINITY:,}", "unlimited"))


def _run_bytes(config: Config, model_facts: Facts) -> int:
    """Return the largest size of `out` during a run, or 0 if the model is unknown."""
    counts = parameter_counts(model_facts)
    if counts is None:
        return 0
    total, trained = counts
    checkpoints = config.train.keep_checkpoints + EXTRA_CHECKPOINTS
    return FLOAT_BYTES * (total * MODEL_COPIES + trained * CHECKPOINT_COPIES * checkpoints)


def _check_disk(name: str, disks: Facts, needed_bytes: int, config: Config | None) -> Row:
    free = [disk["free_bytes"] for disk in disks]
    if name == "out" and config is not None and not config.out_is_url:
        # only rank 0 writes to this folder
        free = free[:1]
    text = f"{value_range(free, size)} free at {disks[0]['folder']}"
    if name == "out" and config is not None and config.out_is_url:
        text += f", the local copy of {config.out}"
    text += f"; a run needs up to {size(needed_bytes)}" if name == "out" and needed_bytes else ""
    text += f"; data.cache_gb allows {size(needed_bytes)}" if name == "data.cache" else ""
    short = [rank for rank, free_bytes in enumerate(free) if free_bytes < needed_bytes]
    if not short:
        return Row(f"disk: {name}", "ok", text)
    advice = {
        "out": "free space there, choose another `out`, or lower train.keep_checkpoints",
        "TMPDIR": "free space there, or set TMPDIR to a larger disk",
        "data.cache": "lower data.cache_gb, or choose another disk",
    }
    level: Level = "fault" if name == "out" else "warning"
    return Row(f"disk: {name}", level, f"{text}: too little on {list_ranks(short)}", advice[name])


def _check_store_writable(url: str) -> None:
    store, name = WritableStore(url, FEW_RETRIES), f"doctor-{uuid.uuid4().hex}"
    store.put(name, b"written by msvae doctor")
    store.delete([name])
