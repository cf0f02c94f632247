"""Room where a run writes: `out`, temporary files and the cache; and whether `out` can be written at all."""

from __future__ import annotations

import shutil
import tempfile
import uuid
from pathlib import Path

from msvae.config import Config
from msvae.distributed.setup import check_writable
from msvae.doctor.patience import Found
from msvae.doctor.row import Facts, Level, Row, extent, failed, listed, size
from msvae.doctor.scene import Scene
from msvae.doctor.weights import FLOAT_BYTES, counts_of
from msvae.shards.stores.remote import Patience
from msvae.shards.stores.writable import WritableStore

LITTLE_BYTES = 10**9
COPIES_OF_TRAINED = 4
"""Of a checkpoint: weights, two moments, average."""
CHECKPOINTS_BESIDE_KEPT = 2
"""The one of the lowest loss, and the one that is being written."""
WHOLE_MODELS = 4
"""`untrained`, `best`, `model`, and one that is being written."""
IMPATIENT = Patience(attempts=2, timeout_s=10.0)


def look(scene: Scene) -> Found:
    """Free bytes of each place of this rank. Writes to `out` as a run would, and leaves nothing behind."""
    places = {"TMPDIR": Path(tempfile.gettempdir())}
    if (config := scene.config) is not None:
        places["out"] = config.folder
        if config.data.cache is not None:
            places["data.cache"] = config.data.cache
        check_writable(config.folder)
        if config.out_is_url and not scene.rank:
            _write_to_store(config.out)
    return {name: {"place": str(place), "free_bytes": _free_bytes(place)} for name, place in places.items()}


def judge(facts: Facts, weights: Facts, config: Config | None) -> list[Row]:
    """A row for each place. The room that a run needs is known where its model is."""
    if (
        row := failed("disk", facts, "choose another `out`, TMPDIR or data.cache, or mend its permissions")
    ) is not None:
        return [row]
    needed = {"TMPDIR": LITTLE_BYTES, "out": 0}
    if config is not None:
        needed["out"] = run_bytes(config, weights)
        needed["data.cache"] = int(config.data.cache_gb * 1e9)
    return [_row(name, [found[name] for found in facts], needed[name], config) for name in facts[0]]


def run_bytes(config: Config, weights: Facts) -> int:
    """What `out` will hold at most; 0 when the model is not known."""
    counts = counts_of(weights)
    if counts is None:
        return 0
    every, trained = counts
    checkpoints = config.train.keep_checkpoints + CHECKPOINTS_BESIDE_KEPT
    return FLOAT_BYTES * (every * WHOLE_MODELS + trained * COPIES_OF_TRAINED * checkpoints)


def _row(name: str, disks: Facts, needed_bytes: int, config: Config | None) -> Row:
    free = [disk["free_bytes"] for disk in disks]
    if name == "out" and config is not None and not config.out_is_url:
        # rank 0 alone writes there
        free = free[:1]
    text = f"{extent(free, size)} free at {disks[0]['place']}"
    if name == "out" and config is not None and config.out_is_url:
        text += f", the mirror of {config.out}"
    text += f"; a run needs up to {size(needed_bytes)}" if name == "out" and needed_bytes else ""
    text += f"; data.cache_gb allows {size(needed_bytes)}" if name == "data.cache" else ""
    short = [rank for rank, one in enumerate(free) if one < needed_bytes]
    if not short:
        return Row(f"disk: {name}", "ok", text)
    advice = {
        "out": "make room, choose another `out`, or keep fewer with train.keep_checkpoints",
        "TMPDIR": "make room, or set TMPDIR to a larger disk",
        "data.cache": "lower data.cache_gb, or choose another disk",
    }
    level: Level = "fault" if name == "out" else "warning"
    return Row(f"disk: {name}", level, f"{text}: too little on {listed(short)}", advice[name])


def _write_to_store(url: str) -> None:
    store, name = WritableStore(url, IMPATIENT), f"doctor-{uuid.uuid4().hex}"
    store.put(name, b"written by msvae doctor")
    store.delete([name])


def _free_bytes(place: Path) -> int:
    nearest = next(path for path in (place.absolute(), *place.absolute().parents) if path.exists())
    return shutil.disk_usage(nearest).free
