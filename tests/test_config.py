from __future__ import annotations

from pathlib import Path

import pytest

from msvae.config import Config, load_config

from .conftest import ROOT


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return path


def test_yaml_sets_values_and_overrides_win(tmp_path):
    path = write(tmp_path, "train: {max_steps: 7, seed: 1}\ndata: {num_workers: 0}\n")
    config = load_config(
        path, ["--train.seed", "5", "--model.pretrained=tiny", "--data.trace", "true", "--data.val=null"]
    )
    assert (config.train.max_steps, config.train.seed, config.data.num_workers) == (7, 5, 0)
    assert (config.model.pretrained, config.data.trace, config.data.val) == ("tiny", True, None)


def test_environment_variables_have_no_effect(monkeypatch):
    for name in ("out", "OUT", "train__max_steps", "TRAIN"):
        monkeypatch.setenv(name, '{"max_steps": 3}')
    assert load_config(None) == Config()


def test_a_dumped_configuration_loads_as_an_equal_one(tmp_path):
    config = load_config(None, ["--train.max_steps", "3", "--optim.betas", "[0.8,0.9]"])
    assert load_config(write(tmp_path, config.dump())) == config


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "train").glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_configuration_loads(path):
    load_config(path)


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("train: {max_step: 7}", [], r"run\.yaml: key train\.max_step is unknown; did you mean train\.max_steps\?"),
        ("trian: {max_steps: 7}", [], r"key trian is unknown; did you mean train\?"),
        ("{}", ["--train.max_stepz", "3"], r"key train\.max_stepz is unknown; did you mean train\.max_steps\?"),
        ("{}", ["--optim.lr=fast"], r"optim\.lr is 'fast': Input should be a valid number"),
        ("{}", ["--train.max_steps", "0"], r"train\.max_steps is '0': Input should be greater than 0"),
        ("{}", ["--train.max_steps"], "expected one argument"),
        ("{}", ["stray"], "unrecognized arguments: stray"),
        ("loss: {mse_weight: 0, sam_weight: 0}", [], "nothing would be trained; set one above 0"),
        ("loss: {mse_weight: 0, sam_weight: 0, range_weight: 1}", [], r"overrides: loss: mse_weight, sam_weight and"),
        ("{}", ["--loss.l1_weight", "inf"], r"loss\.l1_weight is 'inf': Input should be a finite number"),
        (
            "data: {low_coverage: 0.9, high_coverage: 0.2}",
            [],
            r"low_coverage is 0\.9 and high_coverage 0\.2; expected low_coverage below",
        ),
        (
            "optim: {backbone_lr: 1e-5}",
            [],
            r"optim\.backbone_lr is set but model\.train_backbone is none; leave it out, or set",
        ),
        ("[1, 2]", [], "holds list, expected sections"),
        ("a: [", [], "is not valid YAML"),
    ],
)
def test_a_mistake_is_an_error_that_names_the_key(tmp_path, text, overrides, message):
    with pytest.raises(ValueError, match=message):
        load_config(write(tmp_path, text), overrides)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"nothing\.yaml does not exist; msvae's own configurations are in"):
        load_config(tmp_path / "nothing.yaml")


def test_every_key_has_a_help_text():
    schema = Config.model_json_schema()
    fields = {key: field for section in schema["$defs"].values() for key, field in section["properties"].items()}
    assert not [key for key, field in fields.items() if not field.get("description")]
