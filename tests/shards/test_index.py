from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds
from typer.testing import CliRunner

from msvae.cli import app
from msvae.shards.audit.indexing import IndexOptions, index_dataset
from msvae.shards.manifest import Manifest, ShardIndex
from msvae.shards.reader import ShardReader
from msvae.shards.wds_source import ExactSamples

from .conftest import npy, palette_png, png, random_tile

WAVELENGTHS = (475.0, 560.0, 668.0, 717.0, 840.0)
OPTIONS = IndexOptions(wavelengths_nm=WAVELENGTHS, scale=(1e-4,))


def sample(key: str, seed: int = 0) -> list[tuple[str, bytes]]:
    tile, mask = random_tile(seed)
    return [(f"{key}.npy", npy(tile)), (f"{key}.png", png(mask))]


def all_samples(folder: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    reader, found = ShardReader(folder), {}
    for shard, rows in enumerate(reader.samples_per_shard):
        for row in range(rows):
            tile, mask = np.empty(reader.tile_shape, reader.dtype), np.empty(reader.tile_shape[1:], bool)
            found[reader.read_into(shard, row, tile, mask)] = (tile, mask)
    return found


@pytest.fixture
def foreign(tmp_path) -> Path:
    """train/ and val/ by webdataset's own writer: JSON on some samples, masks of 8 bits, keys in a folder."""
    seed = 0
    for split, shards in (("train", 3), ("val", 1)):
        (tmp_path / split).mkdir()
        for shard in range(shards):
            with wds.TarWriter(str(tmp_path / split / f"plot-{shard}.tar")) as tar:
                for row in range(4):
                    tile, mask = random_tile(seed)
                    about = {"json": {"leaf": seed}} if row % 2 else {}
                    name = f"{split}/leaf_{seed:03d}"
                    tar.write({"__key__": name, "npy": tile, "png": mask.astype(np.uint8) * 255, "cls": 3, **about})
                    seed += 1
    return tmp_path


def test_indexed_tars_of_webdataset_hold_the_same_samples(foreign):
    splits = index_dataset(str(foreign), None, OPTIONS)
    assert {name: split.num_samples for name, split in splits.items()} == {"train": 12, "val": 4}
    for split in ("train", "val"):
        urls = [str(path) for path in sorted((foreign / split).glob("*.tar"))]
        plain = {s["__key__"]: s for s in wds.WebDataset(urls, shardshuffle=False).decode("l8")}
        indexed = all_samples(foreign / split)
        assert indexed.keys() == plain.keys()
        for key, (tile, mask) in indexed.items():
            np.testing.assert_array_equal(tile, plain[key]["npy"])
            np.testing.assert_array_equal(mask, plain[key]["png"] > 0)


def test_statistics_are_those_of_the_training_leaf_in_every_split(foreign):
    index_dataset(str(foreign), None, OPTIONS)
    leaf = np.concatenate([t[:, m] for t, m in all_samples(foreign / "train").values()], axis=1).astype(np.float64)
    coverages = [m.mean() for _, m in all_samples(foreign / "train").values()]
    for split in ("train", "val"):
        statistics = json.loads((foreign / split / "manifest.json").read_text())["statistics"]
        assert statistics["num_pixels"] == leaf.shape[1]
        np.testing.assert_allclose(statistics["mean"], leaf.mean(axis=1) * 1e-4, rtol=1e-12)
        np.testing.assert_allclose(statistics["covariance"], np.cov(leaf * 1e-4, bias=True), rtol=1e-9)
        assert statistics["coverage_histogram"] == np.histogram(coverages, 10, (0, 1))[0].tolist()


def test_the_manifest_does_not_depend_on_the_number_of_threads(foreign):
    manifests = set()
    for threads in (1, 4):
        options = IndexOptions(wavelengths_nm=WAVELENGTHS, scale=(1e-4,), overwrite=True, num_threads=threads)
        index_dataset(str(foreign), None, options)
        manifests.add((foreign / "train" / "manifest.json").read_bytes())
    assert len(manifests) == 1


def test_indexing_a_packed_dataset_reproduces_its_files(leaf_shards, tmp_path):
    """All bytes except the statistics, whose sums have another order."""
    index_dataset(str(leaf_shards), tmp_path, IndexOptions(overwrite=True))
    for split in ("train", "val"):
        made, packed = (Manifest.load(folder / split) for folder in (tmp_path, leaf_shards))
        assert made.model_dump(exclude={"statistics"}) == packed.model_dump(exclude={"statistics"})
        np.testing.assert_allclose(made.statistics.covariance, packed.statistics.covariance, rtol=1e-9)
        for path in tmp_path.glob(f"{split}/*.index.json"):
            assert path.read_bytes() == (leaf_shards / split / path.name).read_bytes()


def test_members_are_found_by_their_ending_and_json_may_be_missing(tmp_path, write_tar):
    tile, mask = random_tile(1)
    contents = {"preview.png": png(mask), "leaf.png": png(~mask), "rgb.npy": npy(tile[:3]), "ms.npy": npy(tile)}
    write_tar(tmp_path / "a.tar", [(f"x.{ending}", content) for ending, content in contents.items()])
    with pytest.raises(ValueError, match=r"sample x has the members preview.png, .*--bands-member"):
        index_dataset(str(tmp_path), None, OPTIONS)
    options = IndexOptions("ms.npy", "leaf.png", WAVELENGTHS, scale=(1.0,))
    index_dataset(str(tmp_path), None, options)
    np.testing.assert_array_equal(all_samples(tmp_path)["x"][1], ~mask)
    index = ShardIndex.model_validate_json((tmp_path / "a.index.json").read_bytes())
    assert (index.json_offset, index.json_bytes) == ([0], [0])


FAULTS = {
    "without mask": ([*sample("a"), ("b.npy", npy(random_tile(0)[0]))], r"a\.tar: sample b .*one \.png as its mask"),
    "split key": ([*sample("a"), *sample("b"), *sample("a")], r"a\.tar: sample a occurs twice"),
    "split members": ([sample("a")[0], *sample("b"), sample("a")[1]], r"sample a .*one \.png"),
    "repeated": ([*sample("a"), *sample("a")], r"sample a has its member npy twice"),
    "keys cut at a dot": ([*sample("leaf_0.5m"), *sample("leaf_0.7m")], r"sample leaf_0 .*keys end at the first dot"),
    "another mask": ([("a.npy", sample("a")[0][1]), ("a.png", png(np.zeros((16, 8), bool)))], r"\(8, 16\) px"),
    "colour mask": ([("a.npy", sample("a")[0][1]), ("a.png", png(np.zeros((16, 16, 3), np.uint8)))], "mode RGB"),
    "palette mask": (
        [("a.npy", sample("a")[0][1]), ("a.png", palette_png(np.eye(16, dtype=np.uint8), [255, 255, 255, 0, 0, 0]))],
        "mode P, expected one grey value per",
    ),
    "no png": ([("a.npy", sample("a")[0][1]), ("a.png", b"JFIF")], "sample a has a mask that is not a PNG"),
    "cut png": ([("a.npy", sample("a")[0][1]), ("a.png", sample("a")[1][1][:-40])], "sample a has a mask that is no"),
    "no npy": ([("a.npy", b"PK"), sample("a")[1]], "sample a holds no .npy"),
    "cut npy": ([("a.npy", sample("a")[0][1][:-1]), sample("a")[1]], "sample a has a .npy of 2687 bytes"),
    "objects": ([("a.npy", npy(np.array([{}, 1], object))), sample("a")[1]], "sample a holds Python objects"),
    "big endian": ([("a.npy", npy(np.zeros((5, 16, 16), ">u2"))), sample("a")[1]], "sample a holds big-endian uint16"),
    "fortran": ([("a.npy", npy(np.zeros((5, 16, 16), "<u2", "F"))), sample("a")[1]], "sample a holds a Fortran"),
    "float64": ([("a.npy", npy(np.zeros((5, 16, 16)))), sample("a")[1]], "sample a holds float64, expected uint8"),
    "channels last": ([("a.npy", npy(np.zeros((16, 16, 5), "<u2"))), sample("a")[1]], "write tiles channels first"),
    "odd side": ([("a.npy", npy(np.zeros((5, 12, 12), "<u2"))), sample("a")[1]], "a side in multiples of 8"),
    "two dtypes": (
        [*sample("a"), ("b.npy", npy(np.zeros((5, 16, 16), "u1"))), ("b.png", b"")],
        "b holds a uint8",
    ),
    "two shapes": ([*sample("a"), ("b.npy", npy(np.zeros((4, 16, 16), "<u2"))), ("b.png", b"")], r"b holds .*\(4, 16"),
    "long json": (
        [*sample("a"), ("a.json", b" " * 2**20 + b"{}")],
        r"a has a \.json of 1,048,578 bytes, ",
    ),
    "json": ([*sample("a"), ("a.json", b"{'leaf': 1}")], "sample a has a .json that does not parse"),
    "empty": ([("README", b"nothing")], r"a\.tar: holds no sample"),
    "all empty masks": (
        [("a.npy", sample("a")[0][1]), ("a.png", png(np.zeros((16, 16), bool)))],
        r"test_[^:]*: no finite leaf",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_an_invalid_sample_is_an_error_with_shard_and_key(tmp_path, write_tar, fault):
    members, message = FAULTS[fault]
    write_tar(tmp_path / "a.tar", members)
    with pytest.raises(ValueError, match=message) as error:
        index_dataset(str(tmp_path), None, OPTIONS)
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar"]


def test_a_key_in_two_shards_is_an_error_with_both_shards(tmp_path, write_tar):
    write_tar(tmp_path / "a.tar", [*sample("x"), *sample("y")])
    write_tar(tmp_path / "b.tar", [*sample("z"), *sample("y")])
    with pytest.raises(ValueError, match=r"sample y is in a\.tar and in b\.tar"):
        index_dataset(str(tmp_path), None, OPTIONS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar", "b.tar"]


def test_nan_on_leaf_and_empty_masks_are_excluded_and_counted(tmp_path, write_tar):
    tile = np.full((2, 8, 8), 0.5, np.float32)
    tile[0, 0, :3] = np.nan, np.inf, 0.25
    mask = np.zeros((8, 8), bool)
    mask[0] = True
    members = [("a.npy", npy(tile)), ("a.png", png(mask)), ("b.npy", npy(tile)), ("b.png", png(mask & False))]
    write_tar(tmp_path / "a.tar", members)
    arguments = ["index", str(tmp_path), "--wavelengths", "668,840", "--bands", "red,nir"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "empty mask in 1 tile of" in result.output
    assert "2 leaf pixels of" in result.output
    statistics = Manifest.load(tmp_path).statistics
    assert (statistics.num_pixels, statistics.mean) == (6, pytest.approx([(0.25 + 5 * 0.5) / 6, 0.5]))
    assert Manifest.load(tmp_path).band_names == ["red", "nir"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": (1e-4,)}, r"tiles of 5 bands; give --wavelengths, 5 of them"),
        ({"wavelengths_nm": WAVELENGTHS}, "holds uint16 tiles; give --scale"),
        ({"wavelengths_nm": (475.0,), "scale": (1.0,)}, "got 1 wavelength, .* 5 bands"),
        ({"wavelengths_nm": WAVELENGTHS, "scale": (1.0, 2.0)}, "got 2 values for --scale"),
        ({"wavelengths_nm": WAVELENGTHS, "scale": (1.0,), "band_names": ("red",)}, "1 band name for 5 wavelengths"),
    ],
)
def test_missing_wavelengths_and_scale_are_errors_with_the_option(foreign, options, message):
    with pytest.raises(ValueError, match=message):
        index_dataset(str(foreign), None, IndexOptions(**options))


def test_overwrite_replaces_an_existing_manifest_and_uses_it_for_missing_options(foreign):
    index_dataset(str(foreign), None, OPTIONS)
    with pytest.raises(ValueError, match=r"has a manifest\.json; check it .*--overwrite"):
        index_dataset(str(foreign), None, IndexOptions())
    (foreign / "train" / "plot-1.tar").unlink()
    index_dataset(str(foreign), None, IndexOptions(overwrite=True))
    manifest = Manifest.load(foreign / "train")
    assert (manifest.num_samples, manifest.wavelengths_nm, manifest.scale) == (8, list(WAVELENGTHS), [1e-4] * 5)


def test_a_folder_without_tars_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=rf"neither {re.escape(str(tmp_path))} nor train, val, test .*\.tar"):
        index_dataset(str(tmp_path), None, OPTIONS)


def test_memory_does_not_grow_with_ignored_members(tmp_path):
    """600 MB of members that are not part of a sample need the memory of a few chunks."""
    with tarfile.open(tmp_path / "a.tar", "w") as tar, Path("/dev/zero").open("rb") as zeros:
        for name, content in [*sample("x"), ("x.video", None), *sample("y")]:
            header = tarfile.TarInfo(name)
            header.size = 600_000_000 if content is None else len(content)
            tar.addfile(header, zeros if content is None else io.BytesIO(content))
    code = (
        "import resource, sys; from msvae.shards.audit.indexing import *; before = resource.getrusage(0).ru_maxrss;"
        "index_dataset(sys.argv[1], None, IndexOptions(wavelengths_nm=(1, 2, 3, 4, 5), scale=(1.0,)));"
        "print(resource.getrusage(0).ru_maxrss - before)"
    )
    extra_kib = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, check=True).stdout
    assert int(extra_kib) < 80_000
    assert list(all_samples(tmp_path)) == ["x", "y"]


def test_a_mask_far_from_its_tile_is_refused(tmp_path, write_tar):
    (tile_name, tile), *others = sample("a")
    mask = next(member for member in others if member[0].endswith(".png"))
    write_tar(tmp_path / "a.tar", [(tile_name, tile), ("a.jpg", bytes(2**20)), mask])
    with pytest.raises(ValueError, match=r"sample a has 1,052,032 bytes between tile and mask.*put the mask next to"):
        index_dataset(str(tmp_path), None, OPTIONS)


def test_samples_without_json_pass_stages_of_webdataset(tmp_path, write_tar):
    tar = [member for i, key in enumerate("abcd") for member in sample(key, i)]
    write_tar(tmp_path / "a.tar", tar)
    index_dataset(str(tmp_path), None, OPTIONS)
    source = ExactSamples(tmp_path, seed=0, global_batch_size=4, micro_batch_size=4, num_positions=1)
    seen = list(wds.DataPipeline(source, wds.decode("l8")))
    assert sorted(sample["__key__"] for sample in seen) == ["a", "b", "c", "d"]
    assert all("json" not in sample for sample in seen)


@pytest.mark.parametrize(("scale", "hint"), [("0", "such as 0.0001"), ("nan", "such as"), ("10000", "give 0.0001 to")])
def test_an_implausible_scale_is_refused_as_in_packing(foreign, scale, hint):
    index = ["index", str(foreign), "--wavelengths", "475,560,668,717,840", "--scale", scale]
    pack = ["pack", str(foreign), "--out", str(foreign / "out"), "--scale", scale]
    indexed, packed = (CliRunner().invoke(app, command) for command in (index, pack))
    assert (indexed.exit_code, indexed.output) == (packed.exit_code, packed.output)
    assert indexed.exit_code == 2 and f"got --scale {scale}, expected a number above 0" in indexed.output
    assert hint in indexed.output
    assert not list(foreign.rglob("*.json"))


def test_floats_above_reflectance_are_refused_without_a_scale(tmp_path, write_tar):
    tile, mask = random_tile(1)
    mask[:, :2] = True
    tile = np.where(np.arange(16) < 2, 0.1, 3000).astype(np.float32) + tile * np.float32(1e-6)
    write_tar(tmp_path / "a.tar", [("x.npy", npy(tile)), ("x.png", png(mask))])
    with pytest.raises(ValueError, match=r"cannot hold reflectance.*median leaf value is above 2; give --scale"):
        index_dataset(str(tmp_path), None, IndexOptions(wavelengths_nm=WAVELENGTHS))
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar"]
    arguments = ["index", str(tmp_path), "--wavelengths", "475,560,668,717,840", "--scale", "1"]
    insisted = CliRunner().invoke(app, arguments)
    assert insisted.exit_code == 0
    assert re.search("note: mean leaf reflectance is [0-9.]+, expected 0 to 1", insisted.output)
    scaled = CliRunner().invoke(app, [*arguments[:-1], "1e-4", "--overwrite"])
    assert scaled.exit_code == 0 and "note" not in scaled.output


def test_compressed_tars_are_refused_with_the_command_that_decompresses_them(foreign):
    name = foreign / "val" / "plot-0.tar"
    subprocess.run(["gzip", name], check=True)
    with pytest.raises(ValueError, match=r"val holds plot-0.tar.gz, a compressed tar.*`gunzip .*/val/\*.tar.gz`"):
        index_dataset(str(foreign), None, OPTIONS)
    assert not list(foreign.rglob("*.json"))
    subprocess.run(["gunzip", *(foreign / "val").glob("*.tar.gz")], check=True)
    assert index_dataset(str(foreign), None, OPTIONS)["val"].num_samples == 4


def test_peak_memory_of_floats_stays_bounded_as_bands_grow(tmp_path, write_tar):
    """Histograms of 250 float bands need 250 MiB per shard, and four threads would keep nine shards in flight."""
    tile, mask = np.full((250, 8, 8), 0.5, np.float32), np.ones((8, 8), bool)
    for shard in range(8):
        write_tar(tmp_path / f"{shard}.tar", [(f"x{shard}.npy", npy(tile)), (f"x{shard}.png", png(mask))])
    code = """
import resource, sys
from msvae.shards.audit.indexing import IndexOptions, index_dataset
index_dataset(sys.argv[1], None, IndexOptions(wavelengths_nm=tuple(range(400, 650))))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert int(done.stdout) * 2**10 < 1.7 * 2**30
