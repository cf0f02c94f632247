"""Tiny Stable Diffusion 3 pipelines with random weights and a model of five bands as VAE."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3Pipeline,
)
from diffusers.image_processor import VaeImageProcessor
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

import msvae
from msvae import AutoencoderKLMultispectralAdapter

from ..conftest import ROOT
from .conftest import assert_same_weights, load

WITHOUT_T5 = {"text_encoder_3": None, "tokenizer_3": None}


@pytest.fixture(scope="module")
def pipeline(backbone_folder, statistics) -> StableDiffusion3Pipeline:
    vae = load(backbone_folder, statistics=statistics)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        in_channels=16,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=32,
        out_channels=16,
        pos_embed_max_size=16,
    )
    texts = {f"text_encoder{suffix}": text_encoder() for suffix in ("", "_2")}
    texts |= {f"tokenizer{suffix}": tokenizer() for suffix in ("", "_2")}
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(), vae=vae, **texts, **WITHOUT_T5
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tokenizer() -> CLIPTokenizer:
    words = ("<|startoftext|>", "<|endoftext|>", "a</w>", "f</w>", "a", "l", "e")
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=77)


def text_encoder() -> CLIPTextModelWithProjection:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "projection_dim": 16}
    layers = {"num_hidden_layers": 2, "num_attention_heads": 2}
    return CLIPTextModelWithProjection(
        CLIPTextConfig(vocab_size=7, bos_token_id=0, eos_token_id=1, pad_token_id=1, **sizes, **layers)
    ).eval()


@pytest.fixture(scope="module")
def saved(pipeline, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline") / "saved"
    pipeline.save_pretrained(folder)
    return folder


def reflectance_processor(pipeline: DiffusionPipeline) -> VaeImageProcessor:
    return VaeImageProcessor(
        vae_scale_factor=pipeline.vae_scale_factor,
        vae_latent_channels=pipeline.vae.config.latent_channels,
        do_normalize=False,
    )


def images(pipeline: DiffusionPipeline, output_type: str, **options: object) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        return pipeline(
            "a leaf", num_inference_steps=2, generator=generator, output_type=output_type, **options
        ).images


def decoded(pipeline: DiffusionPipeline) -> torch.Tensor:
    latents, config = images(pipeline, "latent"), pipeline.vae.config
    with torch.no_grad():
        return pipeline.vae.decode(latents / config.scaling_factor + config.shift_factor).sample


def test_a_pipeline_generates_reflectance_of_every_band(pipeline, monkeypatch):
    expected = decoded(pipeline)
    assert expected.shape == (1, 5, 64, 64)
    assert expected.isfinite().all()
    assert not torch.equal(images(pipeline, "pt"), expected), "docs/diffusers.md says that this distorts"
    monkeypatch.setattr(pipeline, "image_processor", reflectance_processor(pipeline))
    assert torch.equal(images(pipeline, "pt"), expected)
    np.testing.assert_array_equal(images(pipeline, "np"), expected.permute(0, 2, 3, 1).numpy())


def test_an_image_to_image_pipeline_encodes_unchanged_reflectance(pipeline, monkeypatch):
    from_image = StableDiffusion3Img2ImgPipeline.from_pipe(pipeline, vae=pipeline.vae)
    from_image.image_processor = reflectance_processor(from_image)
    from_image.set_progress_bar_config(disable=True)
    seen, encode = [], pipeline.vae.encode
    monkeypatch.setattr(pipeline.vae, "encode", lambda x: (seen.append(x), encode(x))[1])
    reflectance = torch.rand(1, 5, 64, 64) * 1.4 - 0.2
    assert images(from_image, "pt", image=reflectance, strength=0.5).shape == reflectance.shape
    assert torch.equal(seen[0], reflectance)


@pytest.mark.parametrize("loader", [DiffusionPipeline, StableDiffusion3Pipeline])
def test_a_saved_pipeline_loads_its_vae(pipeline, saved, loader):
    again = loader.from_pretrained(saved, **WITHOUT_T5)
    again.set_progress_bar_config(disable=True)
    assert type(again.vae) is AutoencoderKLMultispectralAdapter
    assert_same_weights(again.vae, pipeline.vae)
    torch.testing.assert_close(decoded(again), decoded(pipeline))
    other = load(saved / "vae")
    assert loader.from_pretrained(saved, vae=other, **WITHOUT_T5).vae is other


def test_a_saved_pipeline_names_a_class_of_import_msvae(saved):
    library, name = json.loads((saved / "model_index.json").read_text())["vae"]
    assert library == "msvae"
    assert getattr(msvae, name) is AutoencoderKLMultispectralAdapter


def test_a_saved_pipeline_loads_in_half_precision(saved, statistics):
    half = DiffusionPipeline.from_pretrained(saved, torch_dtype=torch.bfloat16, **WITHOUT_T5)
    assert half.vae.dtype == torch.bfloat16
    assert half.vae.leaf_mean.tolist() == torch.tensor(statistics.mean).tolist()
    assert images(half, "pt").isfinite().all()


def test_the_python_examples_of_the_page_run(saved, tmp_path, monkeypatch):
    shutil.copytree(saved, tmp_path / "pipelines" / "leaves")
    shutil.copytree(saved / "vae", tmp_path / "runs" / "leaves" / "best")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "diffusers.md").read_text(), flags=re.DOTALL)
    names: dict[str, object] = {}
    for block in blocks:
        if "push_to_hub" not in block:
            exec(block, names)
    assert names["reflectance"].shape == (1, 5, 64, 64)
