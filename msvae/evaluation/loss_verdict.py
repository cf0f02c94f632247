"""The loss of a model on a split and little else: for weights that are watched and neither kept nor reported."""

from __future__ import annotations

import math
from typing import Any

import torch

from msvae.config import Config
from msvae.distributed.collectives import Ranks
from msvae.evaluation.evaluator import Evaluator
from msvae.losses.spectra import error_and_angle
from msvae.losses.terms import MaskedSum
from msvae.metrics.measures import PEAK_REFLECTANCE, SMALLEST_MSE
from msvae.model.autoencoder import AutoencoderKLMultispectralAdapter
from msvae.shards.loader import Loader
from msvae.shards.order import evaluation_plans


@torch.no_grad()
def evaluate_loss(
    model: AutoencoderKLMultispectralAdapter, evaluator: Evaluator, config: Config, ranks: Ranks
) -> dict[str, Any]:
    """Loss, leaf PSNR and spectral angle, as an evaluation has them. All ranks."""
    reader, batch_size = evaluator.reader, config.data.micro_batch_size
    plans = evaluation_plans(
        reader.samples_per_shard, batch_size=batch_size, rank=ranks.rank, world_size=ranks.world_size
    )
    tally = evaluator.tally(model)
    sums = torch.zeros(2, 2, dtype=torch.float64, device=ranks.device)
    for batch in Loader(
        reader, plans, batch_size=batch_size, num_workers=config.data.num_workers, device=ranks.device
    ):
        error, angle = error_and_angle(tally(batch), batch.tiles, batch.leaf_mask)
        parts = [torch.stack([s.total.double().sum(), s.count.double().sum()]) for s in (error, angle)]
        sums += torch.stack(parts)
    terms, _ = tally.join(ranks)
    mse, angle_rad = (float(MaskedSum(*row).overall()) for row in ranks.all_reduce_sums({"sums": sums})["sums"])
    return {
        "loss": sum(weight * terms[term] for term, weight in config.loss.weights.items() if term in terms),
        "psnr_db": 10 * (math.log10(PEAK_REFLECTANCE**2) - math.log10(max(mse, SMALLEST_MSE))),
        "angle_deg": math.degrees(angle_rad),
    }
