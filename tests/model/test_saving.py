"""Saving and loading: saved models load exactly, and files that cannot be trusted are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from msvae import AutoencoderKLMultispectralAdapter

from .conftest import PLACEMENTS, assert_same_weights, leaf_tiles, load, randomise_new_parts

WEIGHTS = "diffusion_pytorch_model.safetensors"
HALVES = (torch.bfloat16, torch.float16)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_saved_model_loads_bit_for_bit(backbone_folder, statistics, placement, tmp_path):
    model = load(backbone_folder, adapter_placement=placement, statistics=statistics, adapter_init="pca")
    randomise_new_parts(model)
    model.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert_same_weights(model, again)
    sample, leaf = leaf_tiles()
    assert torch.equal(model(sample=sample, mask=leaf)[0], again(sample=sample, mask=leaf)[0])


@pytest.mark.parametrize("dtype", HALVES)
def test_a_variant_is_saved_next_to_the_full_weights_and_loaded(backbone_folder, tmp_path, dtype):
    model = load(backbone_folder)
    model.save_pretrained(tmp_path)
    model.to(dtype).save_pretrained(tmp_path, variant="half")
    assert {path.name for path in tmp_path.glob("*.safetensors")} == {
        WEIGHTS,
        "diffusion_pytorch_model.half.safetensors",
    }
    assert_same_weights(load(tmp_path, variant="half", torch_dtype=dtype), model)
    assert load(tmp_path, variant="half").dtype == torch.float32
    assert_same_weights(load(tmp_path), load(backbone_folder))


def test_a_missing_variant_is_an_error_that_names_its_file(backbone_folder, tmp_path):
    load(backbone_folder).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"diffusion_pytorch_model\.fp16\.safetensors"):
        load(tmp_path, variant="fp16")


@pytest.mark.parametrize("variant", [None, "half"])
def test_sharded_weights_load_bit_for_bit(backbone_folder, statistics, tmp_path, variant):
    model = load(backbone_folder, statistics=statistics)
    model.save_pretrained(tmp_path, max_shard_size="200KB", variant=variant)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert not (tmp_path / WEIGHTS).exists()
    again = load(tmp_path, variant=variant)
    assert_same_weights(model, again)
    sample, leaf = leaf_tiles()
    assert torch.equal(model(sample=sample, mask=leaf)[0], again(sample=sample, mask=leaf)[0])


@pytest.mark.parametrize("option", ["torch_dtype", "dtype"])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("own", [True, False])
def test_weights_load_in_the_requested_precision(backbone_folder, statistics, tmp_path, own, dtype, option):
    folder = backbone_folder
    if own:
        folder = tmp_path / "saved"
        load(backbone_folder, statistics=statistics).save_pretrained(folder)
    model = load(folder, **{option: dtype}, **({} if own else {"statistics": statistics}))
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    sample, leaf = leaf_tiles()
    reconstruction, losses = model(sample=sample, mask=leaf)
    assert reconstruction.isfinite().all()
    assert losses["mse"].isfinite()


class TestHalfPrecision:
    """Half precision rounds weights to 8 or 11 bits, but never the leaf statistics."""

    @pytest.fixture(params=["to", "bfloat16", "half", "loaded"])
    def model(self, request, backbone_folder, statistics) -> AutoencoderKLMultispectralAdapter:
        if request.param == "loaded":
            return load(backbone_folder, statistics=statistics, torch_dtype=torch.bfloat16)
        model = load(backbone_folder, statistics=statistics)
        return model.to(torch.bfloat16) if request.param == "to" else getattr(model, request.param)()

    def test_decoded_reflectance_is_not_rounded(self, model, statistics):
        with torch.no_grad():
            for parameter in model.output_adapter.parameters():
                parameter.zero_()
        decoded = model.decode(torch.zeros(1, 16, 2, 2, dtype=model.dtype)).sample
        expected = torch.tensor(statistics.mean)[:, None, None].expand(5, 16, 16)
        assert torch.equal(decoded[0], expected)

    def test_reflectance_is_not_rounded_before_the_mean_is_subtracted(self, model, statistics):
        seen = []
        model.input_adapter.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        near_mean = np.array(statistics.mean) + 0.01 * np.array(statistics.std)
        model.encode(torch.tensor(near_mean, dtype=torch.float32)[None, :, None, None].expand(1, 5, 16, 16))
        assert seen[0].dtype == model.dtype
        np.testing.assert_allclose(seen[0].detach().double(), 0.01, rtol=1e-2)

    def test_a_cast_back_to_float32_restores_the_statistics(self, model, statistics):
        assert model.float().leaf_mean.tolist() == torch.tensor(statistics.mean).tolist()


def test_statistics_survive_the_meta_device(backbone_folder, statistics):
    config = load(backbone_folder, statistics=statistics).config
    with torch.device("meta"):
        model = AutoencoderKLMultispectralAdapter(**config)
    assert model.to_empty(device="cpu").leaf_std.tolist() == torch.tensor(statistics.std).tolist()


def test_a_pipeline_folder_is_searched_for_its_vae(backbone_folder, tmp_path):
    shutil.copytree(backbone_folder, tmp_path / "pipeline" / "vae")
    direct, found = load(backbone_folder), load(tmp_path / "pipeline")
    assert torch.equal(direct.encoder.conv_in.weight, found.encoder.conv_in.weight)


MISSHAPED = torch.zeros(3, 4, 1, 1)


@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("input_adapter.linear.weight"), r"missing: input_adapter\.linear\.weight"),
        (lambda t: t.update(stray=torch.zeros(1)), "unexpected: stray"),
        (lambda t: t.update({"input_adapter.linear.weight": MISSHAPED}), r"input_adapter\.linear\.weight.*3, 4, 1, 1"),
    ],
)
def test_a_missing_stray_or_misshaped_tensor_is_an_error_that_names_it(
    backbone_folder, tmp_path, change, message, low_cpu_mem_usage
):
    load(backbone_folder).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    change(tensors)
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match=f"do not match its config .*{message}.*; save it again"):
        load(tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)


def test_a_truncated_file_is_an_error_that_names_it(backbone_folder, tmp_path):
    load(backbone_folder).save_pretrained(tmp_path)
    file = tmp_path / WEIGHTS
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=f"no weights that can be read .*{WEIGHTS}"):
        load(tmp_path)


class TestPickledWeights:
    """Pickled weights are never loaded."""

    @pytest.fixture(params=["backbone", "own"])
    def pickled(self, request, backbone_folder, tmp_path) -> Path:
        """Return a folder with valid pickled weights, which diffusers would load with a warning."""
        folder = tmp_path / "pickled"
        if request.param == "own":
            load(backbone_folder).save_pretrained(folder)
        else:
            shutil.copytree(backbone_folder, folder)
        torch.save(load_file(folder / WEIGHTS), folder / "diffusion_pytorch_model.bin")
        (folder / WEIGHTS).unlink()
        return folder

    @pytest.mark.parametrize("options", [{}, {"use_safetensors": None}, {"use_safetensors": False}])
    def test_pickled_weights_are_refused_with_the_conversion_to_use(self, pickled, options):
        with pytest.raises(ValueError, match=r"Pickled weights \(\.bin\) are not read.*convert them to safetensors"):
            load(pickled, **options)

    def test_pickled_weights_are_refused_next_to_safetensors(self, backbone_folder):
        with pytest.raises(ValueError, match="use_safetensors is False"):
            load(backbone_folder, use_safetensors=False)

    def test_an_index_of_shards_cannot_name_pickled_weights(self, pickled):
        tensors = torch.load(pickled / "diffusion_pytorch_model.bin", weights_only=True)
        weight_map = dict.fromkeys(tensors, "diffusion_pytorch_model.bin")
        (pickled / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        with pytest.raises(ValueError, match=r"index\.json names diffusion_pytorch_model\.bin"):
            load(pickled)

    def test_pickled_weights_are_never_written(self, backbone_folder, tmp_path):
        with pytest.raises(ValueError, match="weights are saved only as safetensors"):
            load(backbone_folder).save_pretrained(tmp_path / "saved", safe_serialization=False)
        assert not (tmp_path / "saved").exists()


def test_a_saved_model_refuses_other_bands(backbone_folder, tmp_path):
    load(backbone_folder).save_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match="was saved with adapter_placement=both, got input"):
        load(tmp_path / "saved", adapter_placement="input")


def test_options_that_do_not_affect_weights_can_change_on_loading(backbone_folder, tmp_path):
    load(backbone_folder, use_sam_loss=False).save_pretrained(tmp_path / "saved")
    names = ("blue", "green", "red", "red_edge", "nir")
    again = load(tmp_path / "saved", use_sam_loss=True, background="keep", band_names=names)
    assert again.config.background == "keep"
    assert "sam" in again(sample=leaf_tiles()[0])[1]


def test_a_missing_model_is_one_clear_error(tmp_path):
    with pytest.raises(ValueError, match="nowhere is neither a folder nor a hub id with a model"):
        load(tmp_path / "nowhere")


def test_no_local_path_is_stored(backbone_folder, tmp_path):
    load(backbone_folder).save_pretrained(tmp_path / "saved")
    load(tmp_path / "saved").save_pretrained(tmp_path / "again")
    for folder in ("saved", "again"):
        written = [path.read_text() for path in (tmp_path / folder).iterdir() if path.suffix != ".safetensors"]
        assert len(written) == 2
        for text in written:
            assert str(backbone_folder.parent) not in text
            assert str(tmp_path) not in text
        config = json.loads((tmp_path / folder / "config.json").read_text())
        assert config["_class_name"] == "AutoencoderKLMultispectralAdapter"
        assert config["latent_channels"] == 16


@pytest.mark.parametrize("variant", [None, "half"])
@pytest.mark.parametrize("sizes", [("200KB", "10GB"), ("10GB", "200KB")])
def test_saving_again_replaces_whole_and_sharded_weights(backbone_folder, tmp_path, sizes, variant):
    for i, size in enumerate(sizes):
        model = load(backbone_folder)
        with torch.no_grad():
            model.input_adapter.linear.bias.fill_(i)
        model.save_pretrained(tmp_path, max_shard_size=size, variant=variant)
        assert_same_weights(load(tmp_path, variant=variant), model)
