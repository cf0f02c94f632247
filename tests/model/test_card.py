"""The model card: README.md of every saved model, in folders and on the hub."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard

from msvae import AutoencoderKLMultispectralAdapter
from msvae.config import LossConfig, ModelConfig
from msvae.model.build import TINY_BACKBONE, build_model
from msvae.shards.reader import ShardReader

from .conftest import PLACEMENTS, load
from .hub import Files, serve

LICENCE = "---\nlicense: other\nlicense_name: leaf-licence\nlicense_link: LICENSE.md\n---\n# A backbone\n"
METRICS = {"psnr_db": 38.21, "angle_deg": 1.9}


@pytest.fixture
def pipeline_folder(backbone_folder, tmp_path) -> Path:
    folder = tmp_path / "some-pipeline"
    shutil.copytree(backbone_folder, folder / "vae")
    (folder / "model_index.json").write_text("{}")
    (folder / "README.md").write_text(LICENCE)
    return folder


def card_of(model: AutoencoderKLMultispectralAdapter, folder: Path) -> ModelCard:
    model.save_pretrained(folder)
    return ModelCard.load(folder / "README.md")


def test_the_card_lists_bands_metrics_adapters_and_backbone(pipeline_folder, tmp_path):
    for placement in PLACEMENTS:
        model = load(pipeline_folder, adapter_placement=placement)
        model.register_to_config(metrics=METRICS)
        card = card_of(model, tmp_path / placement)
        rows = re.findall(r"^\| (.+) \| ([\d.]+) \|$", card.text, flags=re.MULTILINE)
        assert rows == [
            *(("blue", "474.73"), ("green", "538.71"), ("red", "650.665"), ("red_edge", "730.635"), ("nir", "850.59")),
            *(("PSNR (dB), more is better", "38.21"), ("spectral angle (degrees), less is better", "1.9")),
        ]
        assert f"`adapter_placement: {placement}`" in card.text
        assert "The backbone is `some-pipeline`, under the licence `leaf-licence`" in card.text
        assert (card.data.library_name, card.data.license, card.data.license_name) == (
            "diffusers",
            "other",
            "leaf-licence",
        )
        assert {"msvae", "multispectral"} <= set(card.data.tags)
        assert card.data.base_model is None, "the name of a folder is no hub id"
        assert card.data.license_link is None, "the saved folder holds no LICENSE.md"


@pytest.mark.parametrize(
    ("readme", "asked"), [("", ""), ("", "vae"), ("vae", ""), ("vae", "vae")], ids=lambda place: place or "pipeline"
)
def test_the_licence_is_read_from_the_card_of_the_backbone_or_its_pipeline(pipeline_folder, readme, asked):
    (pipeline_folder / "README.md").rename(pipeline_folder / readme / "README.md")
    config = load(pipeline_folder / asked).config
    assert config.backbone == "some-pipeline"
    assert config.backbone_licence["license_name"] == "leaf-licence"


@pytest.mark.parametrize("readme", [None, "# Words alone", "---\ntags: [vae]\n---\n", "---\nlicense: [\n---\n"])
def test_the_card_states_that_a_licence_is_unknown(backbone_folder, tmp_path, readme):
    folder = Path(shutil.copytree(backbone_folder, tmp_path / "backbone"))
    if readme is not None:
        (folder / "README.md").write_text(readme)
    card = card_of(load(folder), tmp_path / "saved")
    assert "The backbone is `backbone`. Its licence is unknown. Find out its licence" in card.text
    assert card.data.license is None
    assert "No metrics were stored" in card.text


def test_a_model_trained_from_scratch_has_no_licence(tmp_path):
    model = AutoencoderKLMultispectralAdapter(**TINY_BACKBONE, wavelengths_nm=(560.0,), band_names=("a|b",))
    card = card_of(model, tmp_path)
    assert "trained from scratch, so no licence applies to it" in card.text
    assert "| a\\|b | 560 |" in card.text
    assert "# Multispectral VAE: 1 band, 560 to 560 nm" in card.text


def test_entries_of_the_card_survive_saving_and_can_be_changed_on_loading(pipeline_folder, tmp_path):
    model = load(pipeline_folder)
    model.register_to_config(metrics=METRICS)
    first = card_of(model, tmp_path / "first").content
    again = load(tmp_path / "first")
    assert (again.config.backbone, again.config.metrics) == ("some-pipeline", METRICS)
    assert card_of(again, tmp_path / "second").content == first
    corrected = load(tmp_path / "first", backbone_licence={"license": "mit"}, metrics=None)
    card = card_of(corrected, tmp_path / "third")
    assert card.data.license == "mit"
    assert "No metrics were stored" in card.text


def test_further_training_of_a_saved_model_resets_its_metrics(backbone_folder, leaf_shards, tmp_path):
    model = load(backbone_folder)
    model.register_to_config(metrics=METRICS, factors_of_leaves=True)
    model.save_pretrained(tmp_path)
    manifest = ShardReader(leaf_shards / "train").manifest
    trained_on = build_model(
        ModelConfig(pretrained=str(tmp_path)), LossConfig(), "fill", manifest.bands, manifest.statistics, seed=0
    )
    assert trained_on.config.metrics is None
    assert not trained_on.config.factors_of_leaves
    assert trained_on.config.backbone == model.config.backbone


def test_a_card_written_by_a_person_is_kept_and_a_generated_card_is_overwritten(backbone_folder, tmp_path):
    model = load(backbone_folder)
    model.save_pretrained(tmp_path)
    model.register_to_config(metrics=METRICS)
    assert "38.21" in card_of(model, tmp_path).text
    (tmp_path / "README.md").write_text("# My leaves")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "# My leaves"


def test_only_the_main_process_writes_the_card(backbone_folder, tmp_path):
    load(backbone_folder).save_pretrained(tmp_path, is_main_process=False)
    assert [path.name for path in tmp_path.iterdir()] == ["diffusion_pytorch_model.safetensors"]


def test_the_python_example_of_the_card_runs(backbone_folder, tmp_path, monkeypatch):
    card = card_of(load(backbone_folder), tmp_path / "saved")
    monkeypatch.chdir(tmp_path / "saved")
    names = run_python_of(card)
    assert names["reconstruction"].shape == names["reflectance"].shape == (1, 5, 64, 64)


def run_python_of(card: ModelCard) -> dict[str, torch.Tensor]:
    (code,) = re.findall(r"```python\n(.*?)```", card.content, flags=re.DOTALL)
    names: dict[str, torch.Tensor] = {}
    exec(code, names)
    return names


CLIENT = """
import torch
from huggingface_hub import ModelCard
from msvae import AutoencoderKLMultispectralAdapter
from tests.model.conftest import assert_same_weights
from tests.model.test_card import METRICS, run_python_of

torch.manual_seed(0)
model = AutoencoderKLMultispectralAdapter.from_pretrained("someone/backbone", revision="v2")
model.register_to_config(metrics=METRICS)
model.push_to_hub("me/pushed", variant="half")
model.push_to_hub("me/pushed")
model.save_pretrained("saved", push_to_hub=True, repo_id="me/saved", max_shard_size="200KB")
model.push_to_hub("me/part", subfolder="vae")
model.push_to_hub("me/by-hand")
for name, options in (("pushed", {}), ("pushed", {"variant": "half"}), ("saved", {}), ("part", {})):
    assert_same_weights(AutoencoderKLMultispectralAdapter.from_pretrained(f"me/{name}", **options), model)
    assert run_python_of(ModelCard.load(f"me/{name}"))["reconstruction"].isfinite().all() if name != "part" else True
for name in ("pickled", "indexed"):
    try:
        AutoencoderKLMultispectralAdapter.from_pretrained(f"someone/{name}")
    except ValueError as error:
        print(error)
"""


class TestHub:
    @pytest.fixture(scope="class")
    @staticmethod
    def hub(backbone_folder, tmp_path_factory) -> tuple[dict[str, Files], str]:
        """Return the files of a hub after another process pushed models to it, and the output of that process."""
        folder = tmp_path_factory.mktemp("hub")
        backbone = {f"vae/{path.name}": path.read_bytes() for path in backbone_folder.iterdir()}
        config = backbone["vae/config.json"]
        repos: dict[str, Files] = {
            "someone/backbone@v2": {**backbone, "README.md": LICENCE.encode()},
            "someone/pickled": {"config.json": config, "diffusion_pytorch_model.bin": b"cos\nsystem\n."},
            "someone/indexed": {
                "config.json": config,
                "diffusion_pytorch_model.safetensors.index.json": b'{"metadata": {}, "weight_map": {"a": "w.bin"}}',
                "w.bin": b"cos\nsystem\n.",
            },
            "me/by-hand": {"README.md": b"---\nlicense: mit\n---\n# My leaves"},
        }
        with serve(repos) as endpoint:
            environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(folder), "HF_TOKEN": "hf_none"}
            environment["PYTHONPATH"] = str(Path(__file__).parents[2])
            done = subprocess.run(
                [sys.executable, "-c", CLIENT],
                env=environment,
                cwd=folder,
                capture_output=True,
                text=True,
                timeout=300,
            )
        assert done.returncode == 0, done.stderr[-3000:]
        return repos, done.stdout

    @pytest.mark.parametrize("name", ["pushed", "saved"])
    def test_push_to_hub_and_save_pretrained_upload_the_card(self, hub, name):
        files = hub[0][f"me/{name}"]
        assert {"config.json", "README.md"} < files.keys()
        card = ModelCard(files["README.md"].decode())
        assert "38.21" in card.text
        assert f'from_pretrained("me/{name}")' in card.text
        assert (card.data.base_model, card.data.license_name) == ("someone/backbone", "leaf-licence")
        assert card.data.license_link == "https://huggingface.co/someone/backbone/blob/main/LICENSE.md"

    def test_a_push_to_a_subfolder_does_not_change_the_card_of_the_pipeline(self, hub):
        files = hub[0]["me/part"]
        assert "README.md" not in files
        assert 'from_pretrained("me/part", subfolder="vae")' in files["vae/README.md"].decode()

    def test_a_card_written_by_a_person_stays_on_the_hub(self, hub):
        files = hub[0]["me/by-hand"]
        assert "# My leaves" in files["README.md"].decode()
        assert "diffusion_pytorch_model.safetensors" in files

    def test_pickled_weights_on_the_hub_are_refused(self, hub):
        assert "someone/pickled has no weights that can be read" in hub[1]
        assert "index.json names w.bin" in hub[1]
        assert hub[1].count("convert them to safetensors") == 2
