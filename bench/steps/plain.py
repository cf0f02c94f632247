"""A simple training loop for comparison: adapters around a VAE, boolean indexing, float32, `.item()` in each step."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812 the usual name
from diffusers import AutoencoderKL
from torch import Tensor, nn


class PlainVae(nn.Module):
    """A VAE for three channels, with a convolutional adapter before and after it."""

    def __init__(self, backbone: dict[str, object], num_bands: int, width: int) -> None:
        super().__init__()
        self.vae = AutoencoderKL(**backbone)
        self.before, self.after = (
            nn.Sequential(
                nn.Conv2d(begin, width, 3, padding=1),
                nn.SiLU(),
                nn.Conv2d(width, width, 3, padding=1),
                nn.SiLU(),
                nn.Conv2d(width, end, 3, padding=1),
            )
            for begin, end in ((num_bands, 3), (3, num_bands))
        )

    def forward(self, images: Tensor) -> Tensor:
        """Return the reconstruction (B, C, H, W)."""
        latents = self.vae.encode(self.before(images)).latent_dist.sample()
        images = self.vae.decode(latents).sample
        recon: Tensor = self.after(images)
        return recon


def losses(original: Tensor, recon: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return masked squared error and spectral angle. Boolean indexing selects the spectra."""
    mask = (mask.expand_as(original) > 0.5).float()
    error = F.mse_loss(recon * mask, original * mask, reduction="none")
    per_band = (error * mask).sum(dim=(0, 2, 3)) / (mask.sum(dim=(0, 2, 3)) + 1e-8)
    valid = (torch.norm(original * mask, dim=1) > 1e-6) & (mask[:, 0] > 0.5)
    u, v = original.movedim(1, -1)[valid], recon.movedim(1, -1)[valid]
    cosine = F.cosine_similarity(u, v, dim=-1).clamp(-1 + 1e-7, 1 - 1e-7)
    return per_band.mean(), torch.acos(cosine).mean()


def make_step(backbone: dict[str, object], num_bands: int, width: int, full: bool, device: torch.device) -> Callable[
    [Tensor, Tensor], float
]:  # fmt: skip
    """Return a function that runs one step on images and masks, and returns the loss."""
    model = PlainVae(backbone, num_bands, width).to(device)
    model.vae.requires_grad_(full)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step(images: Tensor, mask: Tensor) -> float:
        mse, angle = losses(images, model(images), mask)
        loss = mse + angle
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return float(loss.item())

    return step
