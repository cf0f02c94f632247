"""Checks of the launch: ranks that joined, network settings of their environment, and equal versions on all ranks."""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist

import msvae
from msvae.distributed.setup import launched_processes
from msvae.doctor.row import Context, Facts, OwnFacts, Row, failed, list_ranks
from msvae.messages import counted
from msvae.runs import library_versions

INTERFACE_SETTINGS = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


def collect_launch(context: Context, engine: str) -> OwnFacts:
    """Return how this rank was launched, and the addresses and interfaces of its machine."""
    return {
        "host": context.host,
        "local_rank": context.local_rank,
        "launched": launched_processes(),
        "joined": context.joined,
        "machines": int(os.environ.get("GROUP_WORLD_SIZE", 1)),
        "engine": engine,
        "backend": str(dist.get_backend()) if dist.is_available() and dist.is_initialized() else "none",
        "rendezvous_address": os.environ.get("MASTER_ADDR", ""),
        "own_address": _own_address(context.host),
        "interfaces": [name for _, name in socket.if_nameindex()],
        "interface_settings": {name: os.environ[name] for name in INTERFACE_SETTINGS if name in os.environ},
    }


def check_launch(facts: Facts, not_joined: str = "") -> list[Row]:
    """Return the rows `ranks`, `engine` and `environment`.

    Args: `not_joined`, the reason why the ranks did not join or did not stay together, is empty if they did.
    """
    if any("fault" in own for own in facts):
        return [Row("launch", "fault", next(own["fault"] for own in facts if "fault" in own))]
    first = facts[0]
    launched, joined, machines = first["launched"], first["joined"], first["machines"]
    found = f"{launched:,} launched, {joined:,} joined, on {counted(machines, 'machine')}"
    if not_joined:
        advice = "fix this first: checks that need several ranks were skipped"
        return [Row("ranks", "fault", f"{found}: {not_joined}", advice), *_check_environment(facts)]
    engine = f"{first['engine']}, backend {first['backend']}" if joined > 1 else f"one process, {first['engine']}"
    return [Row("ranks", "ok", found), Row("engine", "ok", engine), *_check_environment(facts)]


def collect_versions(context: Context) -> OwnFacts:
    """Return the versions of libraries, and digests of msvae's source files and of the configuration.

    The digest of the source files differs if somebody edited the files of one machine.
    """
    code = hashlib.sha256()
    package = Path(msvae.__file__).parent
    for path in sorted(package.rglob("*.py")):
        code.update(str(path.relative_to(package)).encode())
        code.update(path.read_bytes())
    config = "none" if context.config is None else hashlib.sha256(context.config.dump().encode()).hexdigest()[:12]
    return {**library_versions(), "code of msvae": code.hexdigest()[:12], "configuration": config}


def check_versions(facts: Facts) -> list[Row]:
    """Return one row. A fault names each version that differs between ranks, and the rank."""
    if (row := failed("versions", facts, "install msvae the same way on all machines")) is not None:
        return [row]
    first = facts[0]
    differing = []
    for name in first:
        rank = next((rank for rank, own in enumerate(facts) if own[name] != first[name]), None)
        if rank is not None:
            differing.append(f"{name} {first[name]} on rank 0 but {facts[rank][name]} on rank {rank}")
    if differing:
        advice = "install the same versions and code on all machines, and pass the same configuration"
        return [Row("versions", "fault", "; ".join(differing), advice)]
    text = ", ".join(f"{name} {version}" for name, version in first.items())
    return [Row("versions", "ok", f"equal on all ranks: {text}" if len(facts) > 1 else text)]


def _check_environment(facts: Facts) -> list[Row]:
    rows, machines = [], facts[0]["machines"]
    missing = {
        rank: f"{setting}={value}"
        for rank, own in enumerate(facts)
        for setting, value in own["interface_settings"].items()
        if not _interface_exists(setting, value, own["interfaces"])
    }
    if missing:
        rank, setting = next(iter(missing.items()))
        existing = ", ".join(facts[rank]["interfaces"])
        rows.append(
            Row(
                "environment",
                "fault",
                f"{setting} on {list_ranks(list(missing))} matches no interface of that machine, which has {existing}",
                "set the variable to an existing interface, or unset it",
            )
        )
    if machines > 1:
        rows += _check_addresses(facts)
    return rows or [Row("environment", "ok", _interface_settings(facts))]


def _check_addresses(facts: Facts) -> list[Row]:
    rows = []
    if _is_loopback(facts[0]["rendezvous_address"]) and facts[0]["joined"] < facts[0]["launched"]:
        rows.append(
            Row(
                "environment",
                "fault",
                f"the rendezvous address is {facts[0]['rendezvous_address']}, which each machine resolves to itself",
                "set --main_process_ip to an address of machine 0 that the other machines can reach",
            )
        )
    unreachable = [
        rank
        for rank, own in enumerate(facts)
        if _is_loopback(own["own_address"])
        and not own["interface_settings"]
        and not _is_loopback(own["rendezvous_address"])
    ]
    if unreachable:
        rows.append(
            Row(
                "environment",
                "warning",
                f"the host name of {list_ranks(unreachable)} resolves to {facts[unreachable[0]]['own_address']}, "
                "which other machines cannot reach; gloo listens on that address",
                "set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to the network between machines, or fix /etc/hosts",
            )
        )
    return rows


def _interface_exists(setting: str, value: str, interfaces: Sequence[str]) -> bool:
    """Check that a setting matches an interface.

    gloo expects names. NCCL expects beginnings of names, `=` before whole names, and `^` before excluded ones.
    """
    if setting.startswith("NCCL") and value.startswith("^"):
        return True
    wanted = value.removeprefix("=").split(",")
    if setting.startswith("GLOO") or value.startswith("="):
        return any(name in wanted for name in interfaces)
    return any(name.startswith(tuple(wanted)) for name in interfaces)


def _interface_settings(facts: Facts) -> str:
    settings = {f"{name}={value}" for own in facts for name, value in own["interface_settings"].items()}
    return ", ".join(sorted(settings)) or "no network interface is set"


def _own_address(host: str) -> str:
    try:
        return socket.gethostbyname(host)
    except OSError:
        return ""


def _is_loopback(address: str) -> bool:
    return address.startswith("127.") or address in ("localhost", "::1")
