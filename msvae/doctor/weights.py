"""The model that the configuration names: whether it can be had on each machine, and how much of it is trained."""

from __future__ import annotations

from msvae.doctor.patience import Found
from msvae.doctor.row import Facts, Row, failed, size
from msvae.doctor.scene import Scene
from msvae.model.build import build_model
from msvae.shards.manifest import Manifest

FLOAT_BYTES = 4


def look(scene: Scene) -> Found:
    """Makes the model as training would, once on each machine."""
    if scene.config is None or scene.local_rank:
        return {}
    config = scene.config
    try:
        manifest = Manifest.load(config.data.train)
    except ValueError:
        # the row of the shards says so
        return {}
    model = build_model(
        config.model, config.loss, config.data.background, manifest.bands, manifest.statistics, config.train.seed
    )
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return {"all": sum(parameter.numel() for parameter in model.parameters()), "trained": trained}


def judge(facts: Facts) -> list[Row]:
    """Nothing without a configuration."""
    advice = "give model.pretrained a folder that every machine has, or log in with `hf auth login` on each"
    if (row := failed("model", facts, advice)) is not None:
        return [row]
    if (counts := counts_of(facts)) is None:
        return []
    every, trained = counts
    text = (
        f"{every / 1e6:,.1f} M parameters, {trained / 1e6:,.1f} M trained: a gradient of {size(gradient_bytes(facts))}"
    )
    return [Row("model", "ok", text)]


def counts_of(facts: Facts) -> tuple[int, int] | None:
    """Parameters in all, and trained ones; None when that is not known."""
    known = next((found for found in facts if "all" in found), None)
    return None if known is None else (known["all"], known["trained"])


def gradient_bytes(facts: Facts) -> int:
    """What every step sends of each rank; 0 when that is not known."""
    counts = counts_of(facts)
    return 0 if counts is None else FLOAT_BYTES * counts[1]
