"""A resumed run is the same run: what changes its meaning is refused with the lines that differ, the rest is told."""

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
def test_a_model_that_changed_is_refused_with_each_line_that_differs(overrides, lines):
    told = refusal(config_of(**overrides))
    assert told.startswith("step-00000003 belongs to another run (")
    assert all(line in told for line in lines)
    assert told.count("->") == len(lines)
    assert told.endswith("restore these values, or choose another `out`")


def test_other_tiles_and_another_backbone_under_the_same_names_are_refused():
    assert "the training data differ: shards was packed or indexed again" in refusal(config_of(), "other")
    assert "the frozen weights differ" in refusal(config_of(), frozen=1.0)


def test_what_does_not_change_the_meaning_is_told_and_taken():
    before, now = config_of(), config_of(train__log_every=7, data__num_workers=3)
    state = {"identity": run_identity(before, "m", backbone(0.0)), "config": before.model_dump(mode="json")}
    check_identity("step-00000003", state, run_identity(now, "m", backbone(0.0)), now)
    told = changed_values(before.model_dump(mode="json"), now.model_dump(mode="json"))
    assert "train.log_every" in told and "-> 7" in told
    assert "data.num_workers" in told and "-> 3" in told
