"""Train a small SD3 transformer on latents of leaves, and generate new leaves in all bands.

msvae encode RUN/best SHARDS LATENTS
python examples/latent_diffusion.py LATENTS OUT --steps 200

The example contains a torch dataset of latents, rectified flow as in Stable Diffusion 3 with a loss on leaf cells, and
the steps from noise to reflectance. The transformer is tiny and has no text input. For real use, choose a larger one
and train longer.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import rasterio
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from diffusers.training_utils import compute_density_for_timestep_sampling
from PIL import Image
from torch import Tensor
from torch.nn.functional import avg_pool2d
from torch.utils.data import DataLoader, Dataset

from msvae import AutoencoderKLMultispectralAdapter
from msvae.report.composites import Example, composites
from msvae.shards.latents import LatentReader

TEXT_WIDTH = 32
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Latents(Dataset):
    """Shifted and scaled latents of one split, with the leaf share of each latent cell."""

    def __init__(self, folder: Path) -> None:
        self.reader = LatentReader(folder)

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        """Return latents (C, h, w) and leaf share (1, h, w). If moments are stored, each call samples new latents."""
        manifest, sample = self.reader.manifest, self.reader[number]
        latents = torch.from_numpy(sample.latents).float()
        if manifest.kind == "moments":
            mean, logvar = latents.chunk(2)
            latents = mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)
        leaf_mask = torch.from_numpy(sample.leaf_mask)[None].float()
        leaf_share = avg_pool2d(leaf_mask, manifest.tile_px // manifest.cells)
        return (latents - manifest.shift_factor) * manifest.scaling_factor, leaf_share


def make_transformer(channels: int, cells: int) -> SD3Transformer2DModel:
    """Return a transformer of 0.5 million parameters. Stable Diffusion 3 Medium has 24 layers and 24 heads of 64."""
    return SD3Transformer2DModel(
        sample_size=cells,
        patch_size=2 - cells % 2,
        in_channels=channels,
        out_channels=channels,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=TEXT_WIDTH,
        caption_projection_dim=64,
        pooled_projection_dim=TEXT_WIDTH,
        pos_embed_max_size=max(16, cells // 2),
    )


def predict(transformer: SD3Transformer2DModel, noisy: Tensor, timestep: Tensor) -> Tensor:
    """Return the velocity from latents to noise, for a prompt of one zero token."""
    empty_prompt = torch.zeros(len(noisy), 1, TEXT_WIDTH, device=noisy.device)
    return transformer(
        hidden_states=noisy,
        encoder_hidden_states=empty_prompt,
        pooled_projections=empty_prompt[:, 0],
        timestep=timestep,
        return_dict=False,
    )[0]


def train(
    transformer: SD3Transformer2DModel, scheduler: FlowMatchEulerDiscreteScheduler, loader: DataLoader, num_steps: int
) -> None:
    """Train by rectified flow (Esser et al. 2024): timesteps are logit-normal, the target is noise minus latents."""
    optimizer = torch.optim.AdamW(transformer.parameters(), lr=1e-3)
    batches = endless(loader)
    for step in range(1, num_steps + 1):
        latents, leaf_share = (part.to(DEVICE) for part in next(batches))
        noise = torch.randn_like(latents)
        density = compute_density_for_timestep_sampling("logit_normal", len(latents), logit_mean=0.0, logit_std=1.0)
        indices = (density * scheduler.config.num_train_timesteps).long()
        timestep, sigma = scheduler.timesteps[indices].to(DEVICE), scheduler.sigmas[indices].to(DEVICE)
        sigma = sigma[:, None, None, None]
        velocity = predict(transformer, (1 - sigma) * latents + sigma * noise, timestep)
        squared_error = (velocity - (noise - latents)).square().mean(dim=1, keepdim=True)
        loss = (squared_error * leaf_share).sum() / leaf_share.sum().clamp(min=1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step == 1 or step % 20 == 0 or step == num_steps:
            print(f"step {step}/{num_steps}  loss {loss.item():.4f}", flush=True)


def endless(loader: DataLoader) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches of one epoch after another."""
    while True:
        yield from loader


@torch.no_grad()
def generate(
    transformer: SD3Transformer2DModel,
    scheduler: FlowMatchEulerDiscreteScheduler,
    vae: AutoencoderKLMultispectralAdapter,
    shape: tuple[int, ...],
) -> np.ndarray:
    """Turn noise into latents, and return their reflectance (B, bands, H, W)."""
    latents = torch.randn(shape, device=DEVICE)
    scheduler.set_timesteps(28, device=DEVICE)
    for timestep in scheduler.timesteps:
        velocity = predict(transformer, latents, timestep.expand(len(latents)))
        latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
    return vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor).sample.cpu().numpy()


def save(image: np.ndarray, vae: AutoencoderKLMultispectralAdapter, path: Path) -> None:
    """Write reflectance (bands, H, W) as a GeoTIFF with wavelengths, and three of its bands as a PNG."""
    bands = vae.bands
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)  # generated images have no location
        count, height, width = image.shape
        shape = {"count": count, "height": height, "width": width}
        with rasterio.open(path, "w", driver="GTiff", dtype="float32", **shape) as raster:
            raster.write(image)
            for number, (name, nm) in enumerate(zip(bands.names, bands.wavelengths_nm, strict=True), start=1):
                raster.set_band_description(number, name)
                raster.update_tags(number, wavelength=f"{nm:g}", wavelength_units="nm")
    everywhere = np.ones((height, width), dtype=bool)
    picture = composites(bands)[0].draw(Example(path.stem, image, image, everywhere), reconstructed=False)
    Image.fromarray((255 * picture).round().astype(np.uint8)).save(path.with_suffix(".png"))


def main() -> None:
    """Train a transformer, generate images, and save both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("latents", type=Path, help="output folder of `msvae encode`")
    parser.add_argument("out", type=Path, help="folder to write to")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--images", type=int, default=4)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    dataset = Latents(arguments.latents / "train")
    manifest = dataset.reader.manifest
    vae = AutoencoderKLMultispectralAdapter.from_pretrained(arguments.latents / "model").to(DEVICE)
    transformer = make_transformer(manifest.latent_channels, manifest.cells).to(DEVICE)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    train(transformer, scheduler, DataLoader(dataset, batch_size=16, shuffle=True), arguments.steps)
    arguments.out.mkdir(parents=True, exist_ok=True)
    transformer.save_pretrained(arguments.out / "transformer")
    shape = (arguments.images, manifest.latent_channels, manifest.cells, manifest.cells)
    for number, image in enumerate(generate(transformer, scheduler, vae, shape)):
        save(image, vae, arguments.out / f"drawn-{number:03d}.tif")
    print(f"{arguments.images} images of {vae.bands} are in {arguments.out}")


if __name__ == "__main__":
    main()
