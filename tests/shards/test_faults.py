"""Bad samples: replaced by one rule and counted, or an error; and tiles that are stored compressed."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import webdataset as wds

from msvae.packing.options import PackOptions
from msvae.packing.pack import pack
from msvae.shards.loader import Batch, Loader
from msvae.shards.order import evaluation_plans
from msvae.shards.reader import ShardReader
from msvae.shards.sample_codec import decompress_into, encode_tile

from .test_reader import CPU


@pytest.fixture
def split(leaf_shards, tmp_path) -> Path:
    return Path(shutil.copytree(leaf_shards / "train", tmp_path / "train"))


def index_of(split: Path, shard: int) -> dict:
    return json.loads((split / f"leaf-{shard:06d}.index.json").read_text())


def damage(split: Path, shard: int, row: int) -> str:
    """Flip a bit of a tile. Returns: its key."""
    index, tar = index_of(split, shard), split / f"leaf-{shard:06d}.tar"
    content = bytearray(tar.read_bytes())
    content[index["bands_offset"][row] + 500] ^= 1
    tar.write_bytes(content)
    return index["keys"][row]


def batches(split: Path, max_bad_samples: int, rank: int = 0, world_size: int = 1) -> list[Batch]:
    reader = ShardReader(split)
    plans = evaluation_plans(reader.samples_per_shard, batch_size=4, rank=rank, world_size=world_size)
    loader = Loader(reader, plans, batch_size=4, num_workers=2, device=CPU, max_bad_samples=max_bad_samples)
    return list(loader)


def keys(found: list[Batch]) -> list[str]:
    return [key for batch in found for key in batch.keys]


def test_a_bad_sample_is_replaced_by_the_next_that_can_be_read(split):
    sound = keys(batches(split, 0))
    first, second = damage(split, 0, 2), damage(split, 0, 3)
    found = batches(split, max_bad_samples=2)
    replaced = [key for key in sound if key not in (first, second)]
    expected = [replaced[2] if key in (first, second) else key for key in sound]
    assert keys(found) == expected
    bad = [bad for batch in found for bad in batch.bad]
    assert [(b.key, b.replaced_by, b.slot) for b in bad] == [(first, replaced[2], 2), (second, replaced[2], 3)]
    assert all("is truncated or altered" in b.reason for b in bad)
    by_key = {key: tile for batch in found for key, tile in zip(batch.keys, batch.tiles, strict=True)}
    np.testing.assert_array_equal(found[0].tiles[2], by_key[replaced[2]])


def test_the_last_sample_of_a_split_is_replaced_by_the_first(split):
    last = len(ShardReader(split).samples_per_shard) - 1
    damage(split, last, len(index_of(split, last)["keys"]) - 1)
    found = keys(batches(split, max_bad_samples=1))
    assert found[-1] == found[0]


def test_replacements_are_the_same_at_every_world_size(split):
    damage(split, 0, 1), damage(split, 1, 0)
    together = {key: batch.plan.batch_index for batch in batches(split, 2) for key in batch.keys}
    apart = [batch for rank in range(3) for batch in batches(split, 2, rank, 3)]
    assert {key: batch.plan.batch_index for batch in apart for key in batch.keys} == together
    assert sum(len(batch.bad) for batch in apart) == 2


def test_all_samples_of_a_missing_shard_count_as_bad(split):
    lost = index_of(split, 1)["keys"]
    (split / "leaf-000001.tar").unlink()
    found = batches(split, max_bad_samples=len(lost))
    assert len(keys(found)) == sum(ShardReader(split).samples_per_shard)
    assert not set(keys(found)) & set(lost)
    assert len([bad for batch in found for bad in batch.bad]) == len(lost)


def test_exceeding_the_limit_of_bad_samples_is_an_error_with_the_key(split):
    names = damage(split, 0, 1), damage(split, 1, 2)
    with pytest.raises(
        ValueError, match=rf"more than data\.max_bad_samples 1 samples cannot be read.*{'|'.join(names)}"
    ):
        batches(split, max_bad_samples=1)


def test_a_split_without_a_readable_sample_is_an_error(split):
    for tar in split.glob("*.tar"):
        tar.unlink()
    with pytest.raises(ValueError, match=r"no sample of .* can be read"):
        batches(split, max_bad_samples=1000)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32"])
def test_compressed_tiles_are_decoded_to_the_same_bits(dtype):
    values = np.random.default_rng(0).normal(0, 1000, (5, 32, 40)).astype(dtype)
    if dtype == "float32":
        values[0, 0, :3] = np.nan, np.inf, -0.0
    member, tile = encode_tile(values, "delta-blosc2"), np.empty_like(values)
    decompress_into(bytearray(member), tile)
    assert tile.tobytes() == values.tobytes()
    smooth = np.sort(values, axis=-1)
    assert len(encode_tile(smooth, "delta-blosc2")) < smooth.nbytes


def test_a_compressed_tile_follows_the_documented_format():
    values = np.random.default_rng(0).integers(0, 65536, (2, 3, 50)).astype(np.uint16)
    chunk = encode_tile(values, "delta-blosc2")
    stored = np.frombuffer(imagecodecs.blosc2_decode(chunk), np.uint16).reshape(values.shape)
    for row, expected in zip(stored.reshape(-1, 50).tolist(), values.reshape(-1, 50).tolist(), strict=True):
        left = 0
        for plus_128, value in zip(row, expected, strict=True):
            left = (left + plus_128 - 128) % 65536
            assert left == value


def test_tiles_compressed_before_the_format_changed_are_refused_and_not_misread(leaf_images, tmp_path):
    pack([leaf_images], tmp_path / "old", PackOptions(tile_px=32, compression="delta-blosc2"))
    path = tmp_path / "old" / "train" / "manifest.json"
    path.write_text(path.read_text().replace('"delta-blosc2"', '"blosc2"'))
    with pytest.raises(ValueError, match="delta-blosc2"):
        ShardReader(path.parent)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda chunk: chunk[:20], "not a Blosc2 chunk"),
        (lambda chunk: chunk[:-1], "not a Blosc2 chunk"),
        (lambda chunk: chunk[:4] + (2**30).to_bytes(4, "little") + chunk[8:], "not a Blosc2 chunk"),
        (lambda chunk: chunk[:2] + b"\x05" + chunk[3:], "not a Blosc2 chunk"),
        (lambda chunk: chunk[:16] + b"\xa0" + chunk[17:], "not a Blosc2 chunk"),
        (lambda chunk: chunk[:32] + bytes(len(chunk) - 32), "damaged Blosc2 chunk"),
    ],
    ids=["cut to a header", "cut", "larger than the tile", "other codec", "unknown filter", "no content"],
)
def test_a_chunk_with_another_codec_or_size_is_refused_before_decoding(change, reason):
    values = np.sort(np.random.default_rng(0).integers(0, 4096, (5, 32, 32)).astype(np.uint16))
    with pytest.raises(ValueError, match=reason):
        decompress_into(bytearray(change(encode_tile(values, "delta-blosc2"))), np.empty_like(values))


def test_compressed_shards_hold_the_same_samples_as_plain_ones(leaf_images, leaf_shards, tmp_path):
    pack([leaf_images], tmp_path / "small", PackOptions(tile_px=32, tiles_per_shard=7, compression="delta-blosc2"))
    plain, small = batches(leaf_shards / "train", 0), batches(tmp_path / "small" / "train", 0)
    for one, other in zip(plain, small, strict=True):
        assert one.keys == other.keys
        assert one.tiles.numpy().tobytes() == other.tiles.numpy().tobytes()
        assert one.leaf_mask.numpy().tobytes() == other.leaf_mask.numpy().tobytes()
    stored = sum(path.stat().st_size for path in (tmp_path / "small").rglob("*.tar"))
    assert stored < sum(path.stat().st_size for path in leaf_shards.rglob("*.tar"))


def test_plain_webdataset_reads_compressed_tiles_with_one_function(leaf_images, tmp_path):
    pack([leaf_images], tmp_path / "small", PackOptions(tile_px=32, compression="delta-blosc2"))
    folder = tmp_path / "small" / "train"
    shape = ShardReader(folder).tile_shape

    def tile_of(key: str, data: bytes) -> np.ndarray | None:
        if not key.endswith(".bands.blosc2"):
            return None
        tile = np.empty(shape, np.uint16)
        decompress_into(bytearray(data), tile)
        return tile

    dataset = wds.WebDataset(sorted(map(str, folder.glob("*.tar"))), shardshuffle=False).decode(tile_of, "l8")
    theirs = {sample["__key__"]: sample["bands.blosc2"] for sample in dataset}
    reader = ShardReader(folder)
    tile, leaf_mask = np.empty(shape, np.uint16), np.empty(shape[1:], bool)
    for row in range(reader.samples_per_shard[0]):
        key = reader.read_into(0, row, tile, leaf_mask)
        np.testing.assert_array_equal(theirs[key], tile)


@pytest.mark.parametrize("value", [0, 7])
def test_a_constant_tile_is_the_same_after_compression(value):
    values = np.full((5, 64, 64), value, np.uint16)
    tile = np.ones_like(values)
    decompress_into(bytearray(encode_tile(values, "delta-blosc2")), tile)
    np.testing.assert_array_equal(tile, values)


@pytest.mark.parametrize(("column", "value"), [("json_offset", 2**63), ("json_bytes", 2**42)])
def test_an_index_with_absurd_numbers_is_refused_before_anything_is_read(split, column, value):
    path = split / "leaf-000000.index.json"
    index = json.loads(path.read_text())
    index[column][0] = value
    path.write_text(json.dumps(index))
    manifest = json.loads((split / "manifest.json").read_text())
    manifest["shards"]["index_sha256"][0] = hashlib.sha256(path.read_bytes()).hexdigest()
    (split / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=rf"leaf-000000\.index\.json: {column}.*pack this split again"):
        batches(split, 0)
