"""The model in training: trainable parameters, cost of frozen parts, compilation, and host synchronisation."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKL

from msvae import AutoencoderKLMultispectralAdapter
from msvae.config import OptimConfig
from msvae.losses.coverage import check_mask
from msvae.losses.objective import TERMS
from msvae.model.build import TINY_BACKBONE
from msvae.training.optim import make_optimizer

SMALL = {
    **TINY_BACKBONE,
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "block_out_channels": (8, 16),
}
ENCODER_SIDE = ("encoder.", "input_adapter.", "input_attention.")


def model_of(**options: object) -> AutoencoderKLMultispectralAdapter:
    torch.manual_seed(0)
    return AutoencoderKLMultispectralAdapter(**{**SMALL, **options})


def tiles(coverage: float, batch: int = 2, side: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(int(coverage * 100))
    leaf = torch.rand(batch, 1, side, side, generator=generator) < coverage
    return torch.rand(batch, 5, side, side, generator=generator), leaf


def saved_bytes(model: AutoencoderKLMultispectralAdapter) -> int:
    """Return the bytes that one forward pass saves for its backward pass, without parameters."""
    kept: dict[int, int] = {}
    own = {parameter.data_ptr() for parameter in model.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in own:
            kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        sample, leaf = tiles(0.5)
        model(sample=sample, mask=leaf)
    return sum(kept.values())


@pytest.mark.parametrize("train_backbone", ["none", "decoder"])
def test_with_adapter_placement_output_the_frozen_encoder_runs_without_an_autograd_graph(train_backbone):
    model = model_of(adapter_placement="output")
    model.freeze_backbone()
    if train_backbone == "decoder":
        model.decoder.requires_grad_(True)
    sample, leaf = tiles(0.5)
    assert not model.encode(sample, mask=leaf).latent_dist.parameters.requires_grad
    lean = saved_bytes(model)
    model.encoder.conv_in.requires_grad_(True)
    assert model.encode(sample, mask=leaf).latent_dist.parameters.requires_grad
    assert lean < 0.75 * saved_bytes(model)
    assert not any(p.requires_grad for name, p in model.named_parameters() if name.startswith(ENCODER_SIDE[1:]))


@pytest.mark.parametrize("placement", ["both", "input", "output"])
def test_frozen_parts_get_no_gradient_and_no_optimizer_state(placement):
    model = model_of(adapter_placement=placement)
    model.freeze_backbone()
    optimizer = make_optimizer(model, OptimConfig())
    sample, leaf = tiles(0.5)
    losses = model(sample=sample, mask=leaf)[1]
    (losses["mse"] + losses["sam"] + losses["kl"]).backward()
    optimizer.step()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name, p in model.named_parameters() if p.grad is not None} == trained
    assert len(optimizer.state) == len(trained)
    new = (
        ("output_adapter", "output_attention")
        if placement == "output"
        else (
            "input_adapter",
            "input_attention",
            "output_attention",
            "decoder.conv_out" if placement == "input" else "output_adapter",
        )
    )
    assert all(name.startswith(new) for name in trained)
    assert all(any(name.startswith(part) for name in trained) for part in new)


def test_adapters_and_backbone_have_their_own_learning_rates():
    model = model_of()
    model.freeze_backbone()
    model.decoder.requires_grad_(True)
    optimizer = make_optimizer(model, OptimConfig(lr=1e-3, backbone_lr=1e-5))
    rates = {p: group["peak_lr"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        expected = None if name.startswith(("encoder", "quant", "post_quant")) else 1e-3
        assert rates.get(parameter) == (1e-5 if name.startswith("decoder") else expected), name
    one_rate = make_optimizer(model, OptimConfig(lr=1e-3))
    assert {group["peak_lr"] for group in one_rate.param_groups} == {1e-3}


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_forward_compiles_to_one_graph_and_only_once_for_any_coverage(backend):
    model = model_of()
    model.choose_losses(TERMS)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for i, coverage in enumerate((0.5, 0.0, 1.0, 0.02)):
        sample, leaf = tiles(coverage)
        gradients = []
        for run in (compiled, model):
            model.zero_grad()
            with torch._dynamo.config.patch(error_on_recompile=i > 0):
                losses = run(sample=sample, mask=leaf)[1]
                torch.stack([losses[term] for term in TERMS]).sum().backward()
            gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-4 * float(gradients[1].abs().max()))
        # validation changes the config of the model, which must not cause a recompilation
        model.register_to_config(band_importance=[1.0 + i] * 5)


def test_forward_and_backward_never_wait_for_the_device():
    """Tensors on the meta device have no values, so every host synchronisation fails."""
    model = model_of()
    model.choose_losses(TERMS)
    model.to("meta")
    sample, leaf = (tensor.to("meta") for tensor in tiles(0.5))
    losses = model(sample=sample, mask=leaf, sample_posterior=False)[1]
    torch.stack([losses[term] for term in TERMS]).sum().backward()
    with pytest.raises(RuntimeError, match="meta"):
        losses["mse"].item()


def test_sums_only_returns_the_same_sums_and_computes_no_statistics(monkeypatch):
    model = model_of()
    model.choose_losses(TERMS)
    sample, leaf = tiles(0.5)
    expected, losses = model(sample=sample, mask=leaf)
    assert {"mse", "sam", "mask_stats", "sums"} < losses.keys()
    for name in ("mask_stats", "count_nonfinite"):
        monkeypatch.setattr(f"msvae.model.autoencoder.{name}", lambda *_: pytest.fail("statistics were computed"))
    reconstruction, only = model(sample=sample, mask=leaf, sums_only=True)
    assert torch.equal(reconstruction, expected)
    assert list(only) == ["sums"]
    assert list(only["sums"]) == list(TERMS)
    for term, masked_sum in losses["sums"].items():
        assert torch.equal(only["sums"][term].total, masked_sum.total), term
        assert torch.equal(only["sums"][term].count, masked_sum.count), term


def test_every_public_call_checks_the_mask_once(monkeypatch):
    model = model_of()
    sample, leaf = tiles(0.5)
    reconstruction, _ = model(sample=sample)
    checked = []
    monkeypatch.setattr("msvae.model.autoencoder.check_mask", lambda *a: (checked.append(1), check_mask(*a))[1])
    for call in (
        lambda: model(sample=sample, mask=leaf.float()),
        lambda: model.encode(sample, mask=leaf.float()),
        lambda: model.compute_losses(sample, reconstruction, leaf.float()),
        lambda: model.get_band_importance(sample, leaf.float()),
    ):
        checked.clear()
        call()
        assert len(checked) == 1


@pytest.mark.parametrize("form", ["residual", "convolution"])
def test_adapters_have_the_configured_form_and_width(form, tmp_path):
    model = model_of(adapter_form=form, adapter_width=6)
    convolutions = [m for m in model.input_adapter.convolutions if isinstance(m, torch.nn.Conv2d)]
    assert [(c.in_channels, c.out_channels) for c in convolutions] == [(5, 6), (6, 6), (6, 3)]
    assert (model.input_adapter.linear is not None) == (form == "residual")
    sample, _ = tiles(1.0)
    adapted = model.input_adapter(sample)
    if form == "residual":
        weight, bias = model.input_adapter.linear.weight[:, :, 0, 0], model.input_adapter.linear.bias
        expected = torch.einsum("oc,bchw->bohw", weight, sample) + bias[:, None, None]
        torch.testing.assert_close(adapted, expected)
    else:
        assert adapted.std() > 0.001
    model.save_pretrained(tmp_path)
    again = AutoencoderKLMultispectralAdapter.from_pretrained(tmp_path)
    assert torch.equal(again.input_adapter(sample), adapted)


def test_an_adapter_form_without_linear_map_has_none_and_an_unknown_form_is_an_error(tmp_path):
    AutoencoderKL(**SMALL).save_pretrained(tmp_path)
    load = AutoencoderKLMultispectralAdapter.from_pretrained
    assert load(tmp_path, adapter_form="convolution").input_adapter.linear is None
    with pytest.raises(ValueError, match="adapter_form is 'cubic', expected `residual` or `convolution`"):
        load(tmp_path, adapter_form="cubic")


@pytest.mark.parametrize("batch", [1, 3])
def test_band_importance_is_the_one_that_was_measured_last(batch, tmp_path):
    model = model_of()
    assert set(model.get_band_importance().values()) == {1.0}, "attention begins neutral"
    model.register_to_config(band_importance=[0.5, 1.0, 1.5, 0.25, 2.0])
    model.save_pretrained(tmp_path)
    again = AutoencoderKLMultispectralAdapter.from_pretrained(tmp_path)
    assert list(again.get_band_importance().values()) == [0.5, 1.0, 1.5, 0.25, 2.0]
    sample, leaf = tiles(0.5, batch)
    assert set(again.get_band_importance(sample, leaf).values()) == {1.0}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_band_importance_is_measured_in_any_precision_and_on_leaves_alone(dtype):
    model = model_of()
    with torch.no_grad():
        model.input_attention.gate[-1].weight.normal_(generator=torch.Generator().manual_seed(0))
    sample, leaf = tiles(0.5)
    leaf[1] = False
    expected = list(model.get_band_importance(sample[:1], leaf[:1]).values())
    assert max(expected) - min(expected) > 0.01
    assert list(model.get_band_importance(sample, leaf).values()) == pytest.approx(expected)
    model.to(dtype)
    assert list(model.get_band_importance(sample, leaf).values()) == pytest.approx(expected, abs=0.02)
    assert len(model.get_band_importance()) == 5


def test_attention_does_not_overflow_in_half_precision():
    attention = model_of().input_attention.half()
    bands = torch.full((1, 5, 256, 256), 2.0, dtype=torch.float16)
    assert attention.weights(bands, torch.ones_like(bands, dtype=torch.bool)).isfinite().all()
