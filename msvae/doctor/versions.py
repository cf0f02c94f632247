"""Libraries, code and configuration: equal on all ranks, or a run is not one run."""

from __future__ import annotations

import hashlib
from pathlib import Path

import msvae
from msvae.doctor.patience import Found
from msvae.doctor.row import Facts, Row, failed
from msvae.doctor.scene import Scene
from msvae.versions import library_versions


def look(scene: Scene) -> Found:
    """Of this rank. The code is known by the digest of its files, so that a changed checkout is seen too."""
    code = hashlib.sha256()
    package = Path(msvae.__file__).parent
    for path in sorted(package.rglob("*.py")):
        code.update(str(path.relative_to(package)).encode())
        code.update(path.read_bytes())
    config = "none" if scene.config is None else hashlib.sha256(scene.config.dump().encode()).hexdigest()[:12]
    return {**library_versions(), "code of msvae": code.hexdigest()[:12], "configuration": config}


def judge(facts: Facts) -> list[Row]:
    """One row that names each thing that differs, and where."""
    if (row := failed("versions", facts, "install msvae the same way on all machines")) is not None:
        return [row]
    first = facts[0]
    differing = []
    for name in first:
        rank = next((rank for rank, found in enumerate(facts) if found[name] != first[name]), None)
        if rank is not None:
            differing.append(f"{name} {first[name]} on rank 0 but {facts[rank][name]} on rank {rank}")
    if differing:
        advice = "install the same versions, code and configuration on all machines"
        return [Row("versions", "fault", "; ".join(differing), advice)]
    text = ", ".join(f"{name} {version}" for name, version in first.items())
    return [Row("versions", "ok", f"equal on all ranks: {text}" if len(facts) > 1 else text)]
