"""How `msvae inspect` and its neighbours look: tables and a bar chart for the terminal."""

from __future__ import annotations

from collections.abc import Mapping

from rich.table import Table

from msvae.shards.manifest import Manifest
from msvae.shards.overview import Coverage

BAR_CHARS = 40


def new_table(first: str, *others: str) -> Table:
    """A table of numbers with their names to the left."""
    table = Table()
    table.add_column(first)
    for heading in others:
        table.add_column(heading, justify="right")
    return table


def splits_table(manifests: Mapping[str, Manifest], coverages: Mapping[str, Coverage]) -> Table:
    """A row a split. Leaf pixels are counted, or estimated from the tiles that were looked at."""
    table = new_table("split", "shards", "tiles", "leaf pixels", "MB")
    for name, manifest in manifests.items():
        coverage = coverages[name]
        share = manifest.num_samples / coverage.num_tiles
        about = "" if coverage.num_tiles == manifest.num_samples else "about "
        table.add_row(
            name,
            f"{len(manifest.shards):,}",
            f"{manifest.num_samples:,}",
            f"{about}{round(coverage.leaf_pixels * share):,}",
            f"{sum(manifest.shards.size_bytes) / 1e6:,.1f}",
        )
    return table


def bands_table(manifest: Manifest) -> Table:
    """A row a band: reflectance of the training leaf."""
    statistics = manifest.statistics
    percentiles = {f"p{name}": values for name, values in statistics.percentiles.items()}
    table = new_table("band", "nm", "mean", "std", "min", *percentiles, "max")
    table.title = f"reflectance of leaf in training; {manifest.dtype} tiles of {manifest.tile_px} px"
    columns = (statistics.mean, statistics.std, statistics.minimum, *percentiles.values(), statistics.maximum)
    for band, (name, nm) in enumerate(zip(manifest.band_names, manifest.wavelengths_nm, strict=True)):
        table.add_row(name, f"{nm:g}", *(f"{column[band]:.4f}" for column in columns))
    return table


def coverage_chart(name: str, coverage: Coverage, num_tiles: int) -> Table:
    """Tiles by coverage, a bar for each tenth."""
    looked_at = "" if coverage.num_tiles == num_tiles else f", of {coverage.num_tiles:,} tiles in even steps"
    table = Table(title=f"coverage, {name}{looked_at}", box=None, show_header=False, title_justify="left")
    largest = max(coverage.histogram)
    for tenth, count in enumerate(coverage.histogram):
        bar = "█" * round(BAR_CHARS * count / largest) or ("▏" if count else "")
        table.add_row(f"{tenth / 10:.1f}–{(tenth + 1) / 10:.1f}", f"{count:>7,}", bar)
    return table
