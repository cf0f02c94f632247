from __future__ import annotations

import io
import re
import subprocess
import sys

import numpy as np
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from msvae.bands import Bands
from msvae.cli import app
from msvae.cli.data import coverage_chart
from msvae.report.contact_sheet import TILE_SIDE, contact_sheet
from msvae.shards.manifest import Manifest
from msvae.shards.order import evenly_spaced_samples
from msvae.shards.reader import ShardReader
from msvae.shards.splits import Coverage, measure_coverage
from msvae.shards.stores import open_store


def test_inspect_shows_splits_bands_and_coverage(leaf_shards, tmp_path):
    result = CliRunner().invoke(app, ["inspect", str(leaf_shards), "--png", str(tmp_path / "sheet.png")])
    assert result.exit_code == 0, result.output
    manifest = Manifest.load(leaf_shards / "train")
    row = rf"train +│ +{len(manifest.shards)} │ +{manifest.num_samples} │ +{manifest.statistics.num_pixels:,}"
    assert re.search(row, result.output)
    for name, mean in zip(manifest.band_names, manifest.statistics.mean, strict=True):
        assert re.search(rf"{name} .*{mean:.3f}", result.output)
    assert "coverage, val" in result.output
    assert Image.open(tmp_path / "sheet.png").size[0] > 1000


def test_the_chart_of_coverage_omits_empty_bins_at_both_ends():
    console = Console(file=io.StringIO(), width=80)
    console.print(coverage_chart("val", Coverage(3, 9, [0, 0, 1, 0, 2, 0, 0, 0, 0, 0]), 3))
    title, *rows = console.file.getvalue().splitlines()
    assert title.strip() == "coverage, val"
    assert [row.split()[:2] for row in rows] == [["0.2–0.3", "1"], ["0.3–0.4", "0"], ["0.4–0.5", "2"]]


def test_coverage_is_measured_from_all_masks(leaf_shards):
    folder = leaf_shards / "train"
    reader, coverages = ShardReader(folder), []
    tile, mask = np.empty(reader.tile_shape, reader.dtype), np.empty(reader.tile_shape[1:], bool)
    for shard, rows in enumerate(reader.samples_per_shard):
        for row in range(rows):
            reader.read_into(shard, row, tile, mask)
            coverages.append(mask.sum())
    coverage = measure_coverage(open_store(folder), reader.manifest)
    assert (coverage.num_tiles, coverage.leaf_pixels) == (len(coverages), sum(coverages))
    expected = [0] * 10
    for pixels in coverages:
        expected[min(int(pixels) * 10 // mask.size, 9)] += 1
    assert coverage.histogram == expected


def test_evenly_spaced_samples_cover_all_shards():
    assert evenly_spaced_samples([3, 0, 2], 100) == [(0, 0, 0), (0, 1, 1), (0, 2, 2), (2, 0, 3), (2, 1, 4)]
    five = [(0, 0, 0), (1, 0, 10), (2, 0, 20), (3, 0, 30), (3, 10, 40)]
    assert evenly_spaced_samples([10, 10, 10, 11], 5) == five


def test_a_contact_sheet_outlines_leaf_and_survives_nan_and_few_bands():
    tile, mask = np.full((2, 16, 16), 0.5, np.float32), np.zeros((16, 16), bool)
    mask[4:12, 4:12] = True
    tile[0, :4] = np.nan
    bands = Bands.of_wavelengths((668.0, 840.0))
    drawn = [contact_sheet([("train", [("a" * 90, tile, leaf)])], bands) for leaf in (mask, mask & False)]
    outlined, plain = (np.asarray(Image.open(io.BytesIO(png))).astype(int) for png in drawn)
    pink = ((outlined == (255, 0, 200)).all(axis=2)).sum()
    side = TILE_SIDE // 2
    assert pink == 4 * side - 4
    assert not (plain == (255, 0, 200)).all(axis=2).any()


def test_packing_writes_a_contact_sheet_that_overwrite_replaces(leaf_images, tmp_path):
    arguments = ["pack", str(leaf_images), "--out", str(tmp_path / "out"), "--tile", "32"]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    first = (tmp_path / "out" / "contact-sheet.png").read_bytes()
    assert CliRunner().invoke(app, [*arguments, "--overwrite"]).exit_code == 0
    assert (tmp_path / "out" / "contact-sheet.png").read_bytes() == first


def test_packing_and_inspect_draw_the_same_contact_sheet(leaf_images, tmp_path):
    out, sheet = tmp_path / "out", tmp_path / "sheet.png"
    for arguments in (["pack", str(leaf_images), "--out", str(out), "--tile", "16"], ["inspect", str(out)]):
        drawing = ["--png", str(sheet)] if arguments[0] == "inspect" else []
        assert CliRunner().invoke(app, [*arguments, *drawing]).exit_code == 0
    assert (out / "contact-sheet.png").read_bytes() == sheet.read_bytes()


def test_a_manifest_of_a_million_shards_needs_under_a_kilobyte_per_shard(tmp_path):
    """Measured in a new process that loads it, selects samples and simulates a cluster."""
    shards = 1_000_000
    code = f"""
import resource, sys
from pathlib import Path
from msvae.shards.manifest import LeafStatistics, Manifest, Shards
from msvae.shards.schedule import Cluster, simulate
from msvae.shards.order import evenly_spaced_samples
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
if sys.argv[2] == "write":
    one = [1.0]
    statistics = LeafStatistics(num_pixels=1, mean=one, std=one, minimum=one, maximum=one, covariance=[one])
    names = [f"leaf-{{i:06d}}.tar" for i in range({shards})]
    columns = Shards(name=names, num_samples=[128] * {shards}, size_bytes=[10**8] * {shards},
                     index_sha256=[f"{{i:064x}}" for i in range({shards})])
    Manifest(band_names=["a"], wavelengths_nm=one, dtype="uint16", tile_px=256, scale=one, offset=one,
             statistics=statistics, shards=columns).save(Path(sys.argv[1]))
else:
    manifest = Manifest.load(Path(sys.argv[1]))
    assert len(evenly_spaced_samples(manifest.shards.num_samples, 18)) == 18
    assert simulate(manifest, Cluster(128, 8, 4096), seed=0, num_steps=20).rank_samples.sum() == 20 * 4096
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    subprocess.run([sys.executable, "-c", code, tmp_path, "write"], check=True)
    run = subprocess.run([sys.executable, "-c", code, tmp_path, "read"], check=True, capture_output=True, text=True)
    kib_a_shard = int(run.stdout) / shards
    print(f"{kib_a_shard:.2f} KiB a shard")
    assert kib_a_shard < 1
