"""Evaluation of a saved model on a split: metrics of the model and of baselines, tables, and a report."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from msvae.distributed.collectives import Ranks
from msvae.distributed.setup import make_cuda_exact
from msvae.evaluation.baselines import LATENT_BITS, BlockPca, CodecAtRate, Rate, values_per_block
from msvae.evaluation.evaluator import Evaluator, Reconstruct, reconstruct_with
from msvae.evaluation.measurement import Measurement, Measurer, ReconstructAndSumLatents, Units
from msvae.evaluation.report import write_report
from msvae.evaluation.results import Result, write_metrics, write_tables
from msvae.evaluation.summary import LABELS, summary_lines
from msvae.files import replace_files
from msvae.messages import counted
from msvae.metrics.aggregate import NUM_RESAMPLES
from msvae.metrics.codecs import CODECS
from msvae.metrics.detail import EDGE_PX
from msvae.metrics.pca import MAX_VALUES, mean_spectrum, project_spectra
from msvae.model.autoencoder import AutoencoderKLMultispectralAdapter
from msvae.shards.manifest import MANIFEST_NAME
from msvae.shards.reader import ShardReader
from msvae.shards.splits import TileOrigin, tile_origins
from msvae.shards.stores import open_store
from msvae.shards.stores.store import MissingError

BATCH_SIZE = 8
PCA3_VALUES = 3
"""Components of the PCA of spectra. Three bands or fewer would lose nothing, so they have no such baseline."""


def evaluate(model_folder: Path, data: str, out: Path, ranks: Ranks) -> None:
    """Evaluate a model and the baselines on a split. Collective.

    The main process writes `metrics.json`, the CSV tables and `report.html`.

    Args: folder of a saved model, with its untrained state in `../untrained`; a split, or a dataset, whose `test`
        (else `val`) split is used; folder to write to.
    Raises: ValueError if a folder is missing or the bands of the split are not those of the model.
    """
    split = choose_split(data)
    evaluator = Evaluator(ShardReader(split), ranks, BATCH_SIZE, num_workers=1)
    model = load_for_evaluation(model_folder, evaluator)
    untrained = load_for_evaluation(find_untrained(model_folder), evaluator)
    say = _printer(ranks)
    say(f"evaluating on {split}: {counted(evaluator.reader.manifest.num_samples, 'tile')}")
    origins = [TileOrigin(*origin) for origin in ranks.broadcast_object(lambda: tile_origins(evaluator.reader))]
    measurer = Measurer(evaluator, Units.from_origins(origins), say)
    rate = Rate.from_model(model, evaluator.reader.manifest)
    measurements, more = _measure_all(measurer, model, untrained, rate, say)
    if ranks.is_main:
        results = {name: Result.from_measurement(each, more[name]) for name, each in measurements.items()}
        context = {"latent": more["latent"], "rate": asdict(rate), "judged": _describe(measurer, model_folder, split)}
        with replace_files(out, last="metrics.json") as new:
            metrics = write_metrics(new / "metrics.json", results, context)
            tables = write_tables(new, measurements["model"], origins, evaluator.bands)
            write_report(new, model_folder, evaluator, reconstruct_with(model), measurements["model"], metrics, tables)
        for line in summary_lines(metrics):
            say(line)
        say(f"report: {out / 'report.html'}; numbers: {out / 'metrics.json'}; worst images: {out / 'images.csv'}")
    ranks.barrier()


def choose_split(data: str) -> str:
    """Return `data`, a folder or URL, if it is a split, else its `test` or `val` split.

    Raises: ValueError if there is no such split.
    """
    for split in (data, f"{data}/test", f"{data}/val"):
        with suppress(MissingError):
            open_store(split).size_bytes(MANIFEST_NAME)
            return split
    raise ValueError(f"{data} is neither a split nor holds test/ or val/; make shards with `msvae pack`")


def find_untrained(model_folder: Path) -> Path:
    """Return the folder in which training saved the model before its first step.

    Raises: ValueError if it does not exist.
    """
    folder = model_folder.resolve().parent / "untrained"
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder} is missing: training saves the untrained model next to model/; copy that folder there"
        )
    return folder


def load_for_evaluation(folder: Path, evaluator: Evaluator) -> AutoencoderKLMultispectralAdapter:
    """Load a saved model on this rank's device.

    Raises: ValueError if the folder holds no model, or the bands of the model are not those of the split.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds no model; name a folder that training saved, such as RUN/model or RUN/best")
    model = AutoencoderKLMultispectralAdapter.from_pretrained(folder)
    if model.bands.wavelengths_nm != evaluator.bands.wavelengths_nm:
        raise ValueError(
            f"{evaluator.reader.store.location} holds {evaluator.bands}, {folder} expects {model.bands}; "
            "repack with --wavelengths, or use the model trained on these bands"
        )
    device = evaluator.ranks.device
    if device.type == "cuda":
        # the launcher may have chosen a lower precision for training
        make_cuda_exact()
    return model.to(device)  # type: ignore[no-any-return]


def _measure_all(
    measurer: Measurer,
    model: AutoencoderKLMultispectralAdapter,
    untrained: AutoencoderKLMultispectralAdapter,
    rate: Rate,
    say: Callable[[str], None],
) -> tuple[dict[str, Measurement], dict[str, dict[str, Any]]]:
    """Measure the model and all baselines.

    Returns: measurements by name, and further entries for `metrics.json` by name. The entry `latent` contains the
        statistics of the latents of the model.
    """
    evaluator = measurer.evaluator
    manifest = evaluator.reader.manifest
    statistics = manifest.statistics
    through_latents = ReconstructAndSumLatents(model, evaluator)
    codecs = {name: CodecAtRate(codec, evaluator, rate) for name, codec in CODECS.items()}
    reconstructions: dict[str, Reconstruct] = {
        "model": through_latents,
        **codecs,
        "mean_spectrum": lambda batch: mean_spectrum(batch.tiles, statistics.mean),
        "untrained": reconstruct_with(untrained),
    }
    if len(evaluator.bands) > PCA3_VALUES:
        reconstructions["pca3"] = lambda batch: project_spectra(batch.tiles, statistics.mean, statistics.covariance)
    more = _bits_per_value(rate, len(evaluator.bands))
    if values_per_block(manifest, rate) <= MAX_VALUES:
        say(f"fitting {LABELS['pca_latent']}")
        block_pca = BlockPca(evaluator, rate)
        reconstructions["pca_latent"] = block_pca
        more["pca_latent"] |= block_pca.description()
    measurements = {}
    for name in LABELS:
        if name in reconstructions:
            say(f"evaluating {LABELS[name]}")
            measurements[name] = measurer.measure(LABELS[name], reconstructions[name])
    more["latent"] = through_latents.statistics()
    more |= {name: codec.size() for name, codec in codecs.items()}
    return measurements, more


def _bits_per_value(rate: Rate, num_bands: int) -> dict[str, dict[str, Any]]:
    """Return the bits per value of every reconstruction that stores float16 values. Codecs report their own."""
    pca3 = LATENT_BITS * PCA3_VALUES / num_bands
    bits = dict.fromkeys(("model", "untrained", "pca_latent"), rate.bits_per_value)
    bits |= {"pca3": pca3, "mean_spectrum": 0.0}
    return {name: {"bits_per_value": own} for name, own in bits.items()}


def _describe(measurer: Measurer, model_folder: Path, split: str) -> dict[str, Any]:
    """Return what was evaluated, and how."""
    units = measurer.units
    return {
        "model": str(model_folder.resolve()),
        "split": split,
        "manifest_digest": measurer.evaluator.reader.manifest.digest(),
        "num_images": len(units.images),
        "num_groups": len(units.groups),
        "interval_unit": units.kind,
        "num_drawn": units.num_units,
        "num_resamples": NUM_RESAMPLES,
        "edge_px": EDGE_PX,
        "brightness_edges": measurer.brightness_edges,
    }


def _printer(ranks: Ranks) -> Callable[[str], None]:
    """Return a function that prints a line on the main process."""
    console = Console(highlight=False)
    return lambda line: console.print(line, soft_wrap=True, markup=False) if ranks.is_main else None
