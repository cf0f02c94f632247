"""Which image each tile of a split is from, and which group of images stayed together when the split was made."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from msvae.shards.reader import ShardReader

KEY_OF_TILE = re.compile(r"(.+)_r\d+_c\d+")


class Origin(NamedTuple):
    """Of a tile: its key, its image, and its group, which is the image where nothing else is known."""

    key: str
    image: str
    group: str


def origins(reader: ShardReader) -> list[Origin]:
    """Of every tile in stored order, from its key and its JSON alone.

    The image is the key before its last `_rROW_cCOLUMN`; of tiles that others packed the `source` of the JSON, else
    each tile is an image of its own.
    """
    places = [(shard, row) for shard, count in enumerate(reader.samples_per_shard) for row in range(count)]
    with ThreadPoolExecutor(max(1, reader.store.parallel_reads), "msvae-request") as pool:
        return list(pool.map(lambda place: _origin(reader.key(*place), described(reader, *place)), places))


def described(reader: ShardReader, shard: int, row: int) -> dict[str, Any]:
    """What the JSON of one sample says; nothing where it has none, or one that is no object.

    Raises: ValueError naming shard and key when it cannot be read.
    """
    try:
        about = json.loads(reader.about(shard, row) or b"{}")
    except json.JSONDecodeError as error:
        place = f"{reader.store.path(reader.manifest.shards[shard].name)}: sample {reader.key(shard, row)}"
        raise ValueError(f"{place} has broken JSON ({error}); restore the shard or pack this split again") from error
    return about if isinstance(about, dict) else {}


def _origin(key: str, about: Mapping[str, Any]) -> Origin:
    of_tile, source = KEY_OF_TILE.fullmatch(key), about.get("source")
    if of_tile is not None:
        image = of_tile[1]
    elif isinstance(source, list):
        image = ", ".join(map(str, source)) or key
    else:
        image = str(source or key)
    return Origin(key, image, str(about.get("group") or image))
