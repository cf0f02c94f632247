"""A resume with other values of the run identity is refused with each difference; other changes are printed."""

from __future__ import annotations

import pytest
from torch import nn

from msvae.config import load_config
from msvae.training.resume import changed_values, check_identity, run_identity

WAS = {"--data.train": "shards", "--out": "run"}


def config_of(**overrides):
    settings = WAS | {f"--{name.replace('__', '.')}": str(value) for name, value in overrides.items()}
    return load_config(None, [part for setting in settings.items() for part in setting])


def refusal(now, manifest_digest="m", frozen=0.0):
    before = config_of()
    state = {"identity": run_identity(before, "m", backbone(0.0)), "config": before.model_dump(mode="json")}
    with pytest.raises(ValueError) as caught:
        check_identity("step-00000003", state, run_identity(now, manifest_digest, backbone(frozen)), now)
    return str(caught.value)


def backbone(value):
    module = nn.Linear(2, 2)
    nn.init.constant_(module.weight, value)
    nn.init.constant_(module.bias, 0.0)
    return module.requires_grad_(False)


@pytest.mark.parametrize(
    ("overrides", "lines"),
    [
        ({"model__adapter_width": 48}, ["model.adapter_width: 32 -> 48"]),
        (
            {"model__adapter_placement": "output", "model__adapter_init": "random", "data__flips": True},
            [
                "model.adapter_placement: both -> output",
                "model.adapter_init: pca -> random",
                "data.flips: False -> True",
            ],
        ),
    ],
)
def test_a_changed_model_is_refused_with_each_value_that_differs(overrides, lines):
    text = refusal(config_of(**overrides))
    assert text.startswith("step-00000003 belongs to another run (")
    assert all(line in text for line in lines)
    assert text.count("->") == len(lines)
    assert text.endswith("restore these values, or choose another `out`")


def test_changed_tiles_and_a_changed_backbone_under_the_same_name_are_refused():
    assert "the training data differ: shards was packed or indexed again" in refusal(config_of(), "other")
    assert "the frozen weights differ" in refusal(config_of(), frozen=1.0)


def test_changes_outside_the_run_identity_are_accepted_and_printed():
    before, now = config_of(), config_of(train__log_every=7, data__num_workers=3)
    state = {"identity": run_identity(before, "m", backbone(0.0)), "config": before.model_dump(mode="json")}
    check_identity("step-00000003", state, run_identity(now, "m", backbone(0.0)), now)
    text = changed_values(before.model_dump(mode="json"), now.model_dump(mode="json"))
    assert "train.log_every" in text and "-> 7" in text
    assert "data.num_workers" in text and "-> 3" in text
