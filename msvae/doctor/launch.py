"""How the ranks were launched, whether all of them met, and traps in the environment of the network."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence

import torch.distributed as dist
from accelerate import Accelerator

from msvae.distributed.setup import engine_name, launched_processes
from msvae.doctor.patience import Found
from msvae.doctor.row import Facts, Row, listed
from msvae.doctor.scene import Scene
from msvae.messages import counted

INTERFACE_SETTINGS = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


def look(scene: Scene, accelerator: Accelerator | None) -> Found:
    """This rank's place, and what it would tell others of its address."""
    return {
        "host": scene.host,
        "local_rank": scene.local_rank,
        "launched": launched_processes(),
        "joined": scene.joined,
        "machines": int(os.environ.get("GROUP_WORLD_SIZE", 1)),
        "engine": "none" if accelerator is None else engine_name(accelerator),
        "backend": str(dist.get_backend()) if dist.is_available() and dist.is_initialized() else "none",
        "meeting_point": os.environ.get("MASTER_ADDR", ""),
        "own_address": _own_address(scene.host),
        "interfaces": [name for _, name in socket.if_nameindex()],
        "asked_interfaces": {name: os.environ[name] for name in INTERFACE_SETTINGS if name in os.environ},
    }


def judge(facts: Facts, apart: str = "") -> list[Row]:
    """Args: why the ranks did not meet, empty when they did."""
    if any("fault" in found for found in facts):
        return [Row("launch", "fault", next(found["fault"] for found in facts if "fault" in found))]
    first = facts[0]
    launched, joined, machines = first["launched"], first["joined"], first["machines"]
    found = f"{launched:,} launched, {joined:,} joined, on {counted(machines, 'machine')}"
    if apart:
        joining = Row("ranks", "fault", f"{found}: {apart}", "mend this first: what needs several ranks is left out")
        return [joining, *_traps(facts)]
    together = f"{first['engine']}, backend {first['backend']}" if joined > 1 else f"one process, {first['engine']}"
    engine = Row("engine", "ok", together)
    return [Row("ranks", "ok", found), engine, *_traps(facts)]


def _traps(facts: Facts) -> list[Row]:
    rows, machines = [], facts[0]["machines"]
    missing = {
        rank: f"{setting}={asked}"
        for rank, found in enumerate(facts)
        for setting, asked in found["asked_interfaces"].items()
        if not _exists(setting, asked, found["interfaces"])
    }
    if missing:
        rank, setting = next(iter(missing.items()))
        there = ", ".join(facts[rank]["interfaces"])
        rows.append(
            Row(
                "environment",
                "fault",
                f"{setting} on {listed(list(missing))}, whose machine has {there}",
                "name an interface that is there, or unset it",
            )
        )
    if machines > 1:
        rows += _traps_of_machines(facts)
    return rows or [Row("environment", "ok", _settings(facts))]


def _traps_of_machines(facts: Facts) -> list[Row]:
    rows = []
    if _is_loopback(facts[0]["meeting_point"]) and facts[0]["joined"] < facts[0]["launched"]:
        rows.append(
            Row(
                "environment",
                "fault",
                f"the ranks meet at {facts[0]['meeting_point']}, which on every machine is that machine itself",
                "give --main_process_ip the address of machine 0 that the others can reach",
            )
        )
    behind = [
        rank
        for rank, found in enumerate(facts)
        if _is_loopback(found["own_address"])
        and not found["asked_interfaces"]
        and not _is_loopback(found["meeting_point"])
    ]
    if behind:
        rows.append(
            Row(
                "environment",
                "warning",
                f"the name of the machine of {listed(behind)} stands for {facts[behind[0]]['own_address']}, "
                "which others cannot reach; gloo listens there",
                "set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to the network between machines, or mend /etc/hosts",
            )
        )
    return rows


def _exists(setting: str, asked: str, interfaces: Sequence[str]) -> bool:
    """As gloo reads it, names; as NCCL does, beginnings of names, `=` for whole ones and `^` for all but these."""
    if setting.startswith("NCCL") and asked.startswith("^"):
        return True
    wanted = asked.removeprefix("=").split(",")
    if setting.startswith("GLOO") or asked.startswith("="):
        return any(name in wanted for name in interfaces)
    return any(name.startswith(tuple(wanted)) for name in interfaces)


def _settings(facts: Facts) -> str:
    settings = {f"{name}={value}" for found in facts for name, value in found["asked_interfaces"].items()}
    return ", ".join(sorted(settings)) or "no interface is asked for"


def _own_address(host: str) -> str:
    try:
        return socket.gethostbyname(host)
    except OSError:
        return ""


def _is_loopback(address: str) -> bool:
    return address.startswith("127.") or address in ("localhost", "::1")
