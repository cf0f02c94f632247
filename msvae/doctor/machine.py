"""Cores and threads, shared memory and open files of the machines."""

from __future__ import annotations

import os
import resource
import shutil
from pathlib import Path

import torch

from msvae.doctor.patience import Found
from msvae.doctor.row import Facts, Row, extent, failed, listed, size
from msvae.doctor.scene import Scene
from msvae.messages import counted

SHARED_MEMORY = Path("/dev/shm")
NCCL_BYTES_A_RANK = 64 * 2**20
"""What NCCL may take of shared memory for each rank; containers come with 64 MB for all."""
OPEN_FILES = 1024
"""256 shards, as many indexes, and what sockets to other ranks and libraries take."""


def look(scene: Scene) -> Found:
    """What this rank may use of its machine."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    memory = shutil.disk_usage(SHARED_MEMORY) if SHARED_MEMORY.is_dir() else None
    return {
        "cores": len(os.sched_getaffinity(0)),
        "ranks_here": scene.ranks_here,
        "threads": torch.get_num_threads(),
        "readers": 0 if scene.config is None else scene.config.data.num_workers,
        "on_gpu": scene.device.type == "cuda",
        "open_files": soft,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "shared_free_bytes": 0 if memory is None else memory.free,
    }


def judge(facts: Facts) -> list[Row]:
    """One row each."""
    if (row := failed("machine", facts, "")) is not None:
        return [row]
    return [_cores(facts), _shared_memory(facts), _open_files(facts)]


def _cores(facts: Facts) -> Row:
    cores = extent([found["cores"] for found in facts], lambda number: f"{number:.0f}")
    threads = extent([found["threads"] for found in facts], lambda number: counted(int(number), "thread"))
    memory = extent([found["memory_bytes"] for found in facts], size)
    ranks = counted(facts[0]["ranks_here"], "rank")
    text = f"{cores} cores for the {ranks} of a machine, {threads} each, {memory} of memory"
    crowded = [rank for rank, found in enumerate(facts) if found["threads"] * found["ranks_here"] > found["cores"]]
    if crowded:
        fair = max(1, facts[crowded[0]]["cores"] // facts[crowded[0]]["ranks_here"])
        return Row("cores", "warning", f"{text}: too many on {listed(crowded)}", f"set OMP_NUM_THREADS={fair}")
    starved = [
        rank
        for rank, found in enumerate(facts)
        if found["on_gpu"] and (1 + found["readers"]) * found["ranks_here"] > found["cores"]
    ]
    if starved:
        return Row(
            "cores",
            "warning",
            f"{text}, of which {facts[starved[0]]['readers']} readers a rank leave none to spare on {listed(starved)}",
            "lower data.num_workers, or ask the scheduler for more cores (--cpus-per-task)",
        )
    return Row("cores", "ok", text)


def _shared_memory(facts: Facts) -> Row:
    free = [found["shared_free_bytes"] for found in facts]
    text = f"{extent(free, size)} free in {SHARED_MEMORY}"
    short = [
        rank
        for rank, found in enumerate(facts)
        if found["on_gpu"]
        and found["ranks_here"] > 1
        and found["shared_free_bytes"] < NCCL_BYTES_A_RANK * found["ranks_here"]
    ]
    if short:
        return Row(
            "shared memory", "warning", f"{text}: little for NCCL on {listed(short)}", "docker run --shm-size 8g"
        )
    return Row("shared memory", "ok", text)


def _open_files(facts: Facts) -> Row:
    limits = [found["open_files"] for found in facts]
    text = f"{extent(limits, lambda number: f'{number:,.0f}')} open files a process"
    short = [rank for rank, limit in enumerate(limits) if limit != resource.RLIM_INFINITY and limit < OPEN_FILES]
    if short:
        return Row("open files", "warning", f"{text}: few on {listed(short)}", "ulimit -n 4096 before launching")
    return Row("open files", "ok", text.replace(f"{resource.RLIM_INFINITY:,}", "any number of"))
