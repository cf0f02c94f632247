"""Judging a saved model on a split: its numbers beside those of its rivals, tables, and the report."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console

from msvae.distributed.collectives import Ranks
from msvae.distributed.setup import make_cuda_exact
from msvae.evaluation.baselines import AtRate, BlockPca, numbers_per_block
from msvae.evaluation.evaluator import Evaluator, Reconstruct, by_model
from msvae.evaluation.latents import LATENT_BITS, Rate, ThroughLatents
from msvae.evaluation.measurement import Judge, Judged
from msvae.evaluation.report import write_page
from msvae.evaluation.results import Finding, write_metrics
from msvae.evaluation.summary import EXPLANATIONS, LABELS, summary_lines
from msvae.evaluation.tables import write_tables
from msvae.evaluation.units import units_of
from msvae.files import replace_files
from msvae.messages import counted
from msvae.metrics.baselines import mean_spectrum, principal_components
from msvae.metrics.bootstrap import NUM_RESAMPLES
from msvae.metrics.codecs import CODECS
from msvae.metrics.detail import EDGE_PX
from msvae.metrics.pca import MAX_NUMBERS
from msvae.model.autoencoder import AutoencoderKLMultispectralAdapter
from msvae.shards.manifest import MANIFEST_NAME
from msvae.shards.reader import ShardReader
from msvae.shards.splits import TileOrigin, tile_origins
from msvae.shards.stores import open_store
from msvae.shards.stores.store import MissingError

BATCH_SIZE = 8
PCA3_VALUES = 3
"""Of a pixel; of fewer bands these lose nothing, so there is no such rival."""


def evaluate(model_folder: Path, data: str, out: Path, ranks: Ranks) -> None:
    """Judge a model and its rivals on a split; the main process writes `metrics.json`, tables and `report.html`.

    Args: folder of a saved model, its untrained state being `../untrained`; a split, or a data set whose `test` (else
        `val`) split is taken; folder to write to.
    Raises: ValueError when a folder is missing or the split has other bands than the model.
    """
    split = choose_split(data)
    evaluator = Evaluator(ShardReader(split), ranks, BATCH_SIZE, num_workers=1)
    model = load_for(model_folder, evaluator, ranks)
    untrained = load_for(untrained_folder(model_folder), evaluator, ranks)
    say = _announcer(ranks)
    say(f"looking at {split}: {counted(evaluator.reader.manifest.num_samples, 'tile')}")
    found = [TileOrigin(*origin) for origin in ranks.broadcast_object(lambda: tile_origins(evaluator.reader))]
    judge = Judge(evaluator, units_of(found), ranks, say)
    rate = Rate.of(model, evaluator.reader.manifest)
    judged, extras = _judge_all(judge, model, untrained, rate, ranks, say)
    if ranks.is_main:
        findings = {name: Finding.of(columns, extras[name]) for name, columns in judged.items()}
        about = {"latent": extras["latent"], "rate": rate.plain(), "judged": _about(judge, model_folder, split)}
        with replace_files(out, last="metrics.json") as new:
            metrics = write_metrics(new / "metrics.json", findings, about)
            rows = write_tables(new, judged["model"], found, evaluator.bands)
            write_page(new, model_folder, evaluator, by_model(model), judged["model"], metrics, rows)
        for line in summary_lines(metrics):
            say(line)
        say(f"report: {out / 'report.html'}; numbers: {out / 'metrics.json'}; worst first: {out / 'images.csv'}")
    ranks.barrier()


def choose_split(data: str) -> str:
    """`data`, a folder or URL, when it is a split, else its `test` or `val` split.

    Raises: ValueError when it is neither.
    """
    for split in (data, f"{data}/test", f"{data}/val"):
        with suppress(MissingError):
            open_store(split).size_bytes(MANIFEST_NAME)
            return split
    raise ValueError(f"{data} is neither a split nor holds test/ or val/; make shards with `msvae pack`")


def untrained_folder(model_folder: Path) -> Path:
    """Where training left the model as it was before its first step.

    Raises: ValueError when it is not there.
    """
    folder = model_folder.resolve().parent / "untrained"
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is missing: the untrained model that training saves beside model/; copy it there")
    return folder


def load_for(folder: Path, evaluator: Evaluator, ranks: Ranks) -> AutoencoderKLMultispectralAdapter:
    """A saved model on this rank's device.

    Raises: ValueError when it is no model of ours or its bands are not those of the split.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds no model; name a folder that training saved, such as RUN/model or RUN/best")
    model = AutoencoderKLMultispectralAdapter.from_pretrained(folder)
    if model.bands.wavelengths_nm != evaluator.bands.wavelengths_nm:
        raise ValueError(
            f"{evaluator.reader.store.location} holds {evaluator.bands}, {folder} expects {model.bands}; "
            "repack with --wavelengths, or use the model trained on these bands"
        )
    if ranks.device.type == "cuda":
        # whatever precision the launcher asks for training
        make_cuda_exact()
    return model.to(ranks.device)  # type: ignore[no-any-return]


def _judge_all(
    judge: Judge,
    model: AutoencoderKLMultispectralAdapter,
    untrained: AutoencoderKLMultispectralAdapter,
    rate: Rate,
    ranks: Ranks,
    say: Callable[[str], None],
) -> tuple[dict[str, Judged], dict[str, dict[str, Any]]]:
    """What was measured of every reconstruction, and what else is known of it, by name; and of the `latent`."""
    evaluator = judge.evaluator
    statistics = evaluator.reader.manifest.statistics
    through_latents = ThroughLatents(model, evaluator)
    codecs = {name: AtRate(codec, evaluator, rate, ranks) for name, codec in CODECS.items()}
    reconstructions: dict[str, Reconstruct] = {
        "model": through_latents,
        **codecs,
        "mean_spectrum": lambda batch: mean_spectrum(batch.tiles, statistics.mean),
        "untrained": by_model(untrained),
    }
    if len(evaluator.bands) > PCA3_VALUES:
        reconstructions["pca3"] = lambda batch: principal_components(
            batch.tiles, statistics.mean, statistics.covariance
        )
    extras = _bits_per_value(rate, len(evaluator.bands))
    if numbers_per_block(evaluator.reader, rate) <= MAX_NUMBERS:
        say(f"fitting {LABELS['pca_latent']}")
        block_pca = BlockPca(evaluator, rate, ranks)
        reconstructions["pca_latent"] = block_pca
        extras["pca_latent"] |= block_pca.about()
    judged = {}
    for name in EXPLANATIONS:
        if name in reconstructions:
            say(f"judging {LABELS[name]}")
            judged[name] = judge.judge(LABELS[name], reconstructions[name])
    extras["latent"] = through_latents.numbers(ranks)
    extras |= {name: codec.numbers(ranks) for name, codec in codecs.items()}
    return judged, extras


def _bits_per_value(rate: Rate, num_bands: int) -> dict[str, dict[str, Any]]:
    """Of all but codecs, which take what they need; numbers as float16."""
    pca3 = LATENT_BITS * PCA3_VALUES / num_bands
    bits = dict.fromkeys(("model", "untrained", "pca_latent"), rate.bits_per_value)
    bits |= {"pca3": pca3, "mean_spectrum": 0.0}
    return {name: {"bits_per_value": own} for name, own in bits.items()}


def _about(judge: Judge, model_folder: Path, split: str) -> dict[str, Any]:
    """What was judged, and how."""
    manifest, units = judge.evaluator.reader.manifest, judge.units
    return {
        "model": str(model_folder.resolve()),
        "split": split,
        "manifest_digest": manifest.digest(),
        "num_images": len(units.images),
        "num_groups": len(units.groups),
        "interval_unit": units.kind,
        "num_drawn": units.num_drawn,
        "num_resamples": NUM_RESAMPLES,
        "edge_px": EDGE_PX,
        "brightness_edges": judge.brightness_edges,
    }


def _announcer(ranks: Ranks) -> Callable[[str], None]:
    console = Console(highlight=False)
    return lambda line: console.print(line, soft_wrap=True, markup=False) if ranks.is_main else None
