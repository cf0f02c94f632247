from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from msvae.bands import Bands
from msvae.cli import app
from msvae.messages import counted
from msvae.packing.options import PackOptions

from .conftest import ROOT


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.output


def test_synthetic_leaves_are_packed_and_the_bands_are_printed(tmp_path):
    assert run("synth", tmp_path / "leaves", "--images", 4, "--size", 64) == (
        0,
        f"4 leaf images and their masks are in {tmp_path / 'leaves'}\n",
    )
    code, output = run("pack", tmp_path / "leaves", "--out", tmp_path / "shards", "--tile", 32)
    assert code == 0
    assert "5 bands (475, 539, 651, 731, 851 nm), uint16, tiles of 32 px" in output
    assert {path.name for path in (tmp_path / "shards").iterdir()} == {"train", "val", "test", "contact-sheet.png"}


def test_parts_print_missing_shards_and_merging_prints_dropped_tiles(leaf_images, tmp_path):
    command = ["pack", leaf_images, "--out", tmp_path / "shards", "--tile", 32, "--min-coverage", 0.6]
    assert run(*command, "--part", "1/2")[1].split(";")[0] == "2 of 3 shards are made"
    assert run(*command, "--part", "2/2")[1].split(";")[0] == "3 of 3 shards are made"
    code, output = run(*command, "--merge")
    assert code == 0
    assert "coverage below 0.60" in output
    assert "leaf pixels" in output and "tiles cover" in output
    assert [path.name for path in tmp_path.iterdir()] == ["shards"]


def test_a_late_part_is_refused_because_the_dataset_is_finished(leaf_images, tmp_path):
    command = ["pack", leaf_images, "--out", tmp_path / "shards", "--tile", 32]
    assert run(*command)[0] == 0
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    code, output = run(*command, "--part", "2/3")
    assert code == 2
    assert "is a finished dataset: if it was made of these parts, part 2/3 has nothing left to do" in output
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    code, output = run(*command[:-1], 16, "--part", "2/3")
    assert code == 2 and "exists and is not empty; name another folder or give --overwrite" in output


def test_parts_that_replace_a_dataset_print_the_command_that_merges_them(leaf_images, tmp_path):
    command = ["pack", leaf_images, "--out", tmp_path / "shards", "--tile", 32]
    assert run(*command)[0] == 0
    hints = [run(*command, "--part", f"{part}/2", "--overwrite")[1].split(";")[1] for part in (1, 2)]
    merge = f"run this command with --merge --overwrite instead of --part to replace {tmp_path}/shards\n"
    assert hints == [f" when all parts are made, {merge}", f" {merge}"]
    assert run(*command, "--merge", "--overwrite")[0] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["shards"]


def test_a_message_on_a_terminal_wraps_between_words_and_never_inside_a_path(tmp_path):
    folder = tmp_path / ("a-rather-long-name-" * 4) / "images"
    command = f"stty cols 80; {sys.executable} -c 'from msvae.cli import app; app()' verify {folder}"
    shown = subprocess.run(["script", "-qec", command, "/dev/null"], capture_output=True, text=True)
    lines = [line for line in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.stdout).splitlines() if "━" not in line]
    assert shown.returncode == 2 and str(folder) in shown.stdout
    text = " ".join(line.strip() for line in lines if line.strip())
    assert f"error: neither {folder} nor train, val, test inside it holds a manifest.json; make shards" in text
    assert all(len(line) <= 80 or " " not in line for line in lines)


def test_counts_use_singular_and_plural():
    assert [counted(n, "tile") for n in (0, 1, 2, 1024)] == ["0 tiles", "1 tile", "2 tiles", "1,024 tiles"]
    assert [counted(n, "micro batch", "micro batches") for n in (1, 2)] == ["1 micro batch", "2 micro batches"]


def test_the_rice_field_is_packed_as_the_readme_shows(rice, tmp_path):
    files = "blue.tif,green.tif,red.tif,red_edge.tif,nir.tif"
    out = tmp_path / "shards"
    code, output = run("pack", rice, "--out", out, "--band-files", files, "--mask", "ndvi>0.10", "--tile", 128)
    assert code == 0
    assert "1 image, " in output
    assert "note: no wavelengths stated" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pack", "{tmp}/nothing", "--out", "{tmp}/o"], "nothing does not exist"),
        (["pack", "{tmp}", "--out", "{tmp}/o"], "error: "),
        (["pack", "{tmp}", "--out", "{tmp}/o", "--tile", "100"], "got --tile 100, expected a multiple of 8"),
        (
            ["pack", "{tmp}", "--out", "{tmp}/o", "--wavelengths", "475,red"],
            "got --wavelengths 475,red, expected numbers",
        ),
        (["pack", "{tmp}", "--out", "{tmp}/o", "--part", "3"], "got --part 3, expected two numbers such as 1/8"),
        (["pack", "{tmp}", "--out", "{tmp}/o", "--part", "3/2"], "got --part 3/2, expected 1/2 to 2/2"),
        (
            ["pack", "{tmp}", "--out", "{tmp}/o", "--group-by", "(a"],
            "got --group-by (a, which is not a regular expression",
        ),
        (["synth", "/proc/leaves"], "error: "),
        (["synth", "{tmp}/" + 300 * "a"], "aaa; check this path and its permissions"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, arguments, message):
    code, output = run(*(argument.format(tmp=tmp_path) for argument in arguments))
    assert code == 2
    assert message in output
    assert output.count("\n") == 1
    assert "Traceback" not in output
    assert not list(tmp_path.iterdir())


def test_bands_are_found_by_wavelength():
    assert [Bands().index(role) for role in ("blue", "green", "red", "red_edge", "nir")] == [0, 1, 2, 3, 4]
    nominal = Bands.of_wavelengths((840.0, 717.0, 668.0, 560.0, 475.0))
    assert [nominal.index(role) for role in ("blue", "green", "red", "red_edge", "nir")] == [4, 3, 2, 1, 0]
    with pytest.raises(ValueError, match=r"got 1 band \(475 nm\), expected one from 760 to 950 nm as nir"):
        Bands.of_wavelengths((475.0,)).index("nir")


def test_the_python_code_of_the_readme_runs(leaf_images, tmp_path, monkeypatch, capsys):
    from msvae import AutoencoderKLMultispectralAdapter
    from msvae.model.build import TINY_BACKBONE

    quickstart = tmp_path / "runs" / "quickstart"
    AutoencoderKLMultispectralAdapter(**TINY_BACKBONE).save_pretrained(quickstart / "run" / "best")
    (quickstart / "images").symlink_to(leaf_images)
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    exec(code, {})
    assert "coverage 0." in capsys.readouterr().out


def test_overwriting_keeps_files_that_pack_did_not_write(leaf_images, tmp_path):
    out = tmp_path / "shards"
    assert run("pack", leaf_images, "--out", out, "--tile", 32)[0] == 0
    assert run("pack", leaf_images, "--out", out, "--tile", 32, "--overwrite")[0] == 0
    (out / "train" / "thesis.txt").write_text("mine")
    code, output = run("pack", leaf_images, "--out", out, "--tile", 32, "--overwrite")
    assert (code, (out / "train" / "thesis.txt").read_text()) == (2, "mine")
    assert "--overwrite would delete train/thesis.txt" in output


@pytest.mark.slow
def test_a_failed_quickstart_keeps_the_earlier_one(tmp_path):
    earlier = tmp_path / "earlier"
    (earlier / "run" / "model").mkdir(parents=True)
    (earlier / ".quickstart").touch()
    (earlier / "report.html").write_text("last week")
    done = quickstart(tmp_path, "--images", "nothing", "--out", "earlier")
    assert done.returncode == 2
    assert (earlier / "report.html").read_text() == "last week"
    assert (earlier / "run" / "model").is_dir()


def quickstart(tmp_path: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(ROOT / "launch" / "quickstart.sh"), *map(str, arguments)]
    return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=900)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--images"], "error: --images has no value"),
        (["--steps", "0"], "error: --steps is '0', expected a number of 1 or more"),
        (["--imagse", "x"], "error: unknown option --imagse"),
        (["--images", "nothing"], "error: nothing does not exist"),
        (["--images", "nothing", "--", "--mask", "ndvi>0.1"], "error: nothing does not exist"),
        (["--images", "mine/images", "--out", "mine"], "error: mine/images is inside mine, which quickstart replaces"),
        (["--images", "taken/thesis.txt", "--out", "taken"], "error: taken exists and was not written by quickstart"),
    ],
)
def test_quickstart_refuses_wrong_arguments_and_writes_nothing(tmp_path, arguments, message):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("mine")
    done = quickstart(tmp_path, *arguments)
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["thesis.txt"]


@pytest.mark.slow
def test_quickstart_writes_a_trained_model_and_a_report(tmp_path):
    for steps in (12, 200):  # the second run reuses the environment and replaces the first
        done = quickstart(tmp_path, "--out", "quick", "--steps", steps)
        assert done.returncode == 0, done.stderr[-3000:]
    out = tmp_path / "quick"
    metrics = json.loads((out / "metrics.json").read_text())
    trained, untrained, mean = (
        metrics["model"],
        metrics["baselines"]["untrained"],
        metrics["baselines"]["mean_spectrum"],
    )
    assert trained["psnr_db"] > max(untrained["psnr_db"], mean["psnr_db"]) + 1
    assert trained["angle_deg"] < untrained["angle_deg"] - 1
    assert trained["ndvi_mae"] < 0.8 * untrained["ndvi_mae"]
    for name in ("metrics.json", "report.html", "images.csv", "shards/train/manifest.json", "run/model/config.json"):
        assert (out / name).is_file(), name
    for words in (
        "before training: leaf PSNR",
        "after training: leaf PSNR",
        "tensorboard --logdir quick/run/tensorboard",
    ):
        assert words in done.stdout


@pytest.mark.slow
def test_quickstart_trains_on_a_real_field(rice, tmp_path):
    files = "blue.tif,green.tif,red.tif,red_edge.tif,nir.tif"
    pack_options = ("--", "--band-files", files, "--mask", "ndvi>0.10", "--tile", 128)
    done = quickstart(tmp_path, "--images", rice, "--out", "field", "--steps", 6, *pack_options)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "field" / "report.html").is_file()


def test_every_option_of_pack_reaches_packing_under_its_own_name(monkeypatch, tmp_path):
    """Each value differs from the default and is parsed as the Python option expects it."""
    given = {
        "band_files": ("blue.tif, nir.tif", ("blue.tif", "nir.tif")),
        "nodata": ("7", 7.0),
        "bands": ("2,1", ("2", "1")),
        "wavelengths_nm": ("475,840", (475.0, 840.0)),
        "tolerance_nm": ("5", 5.0),
        "scale": ("0.001", 0.001),
        "offset": ("-0.1", -0.1),
        "mask_files": ("{stem}_leaf.png", "{stem}_leaf.png"),
        "min_object_px": ("9", 9),
        "erode_px": ("2", 2),
        "tile_px": ("64", 64),
        "stride_px": ("32", 32),
        "min_coverage": ("0.2", 0.2),
        "split": ("0.5 0.25 0.25", (0.5, 0.25, 0.25)),
        "group_by": ("plant_(.)", "plant_(.)"),
        "gap_px": ("3", 3),
        "seed": ("5", 5),
        "num_workers": ("2", 2),
        "part": ("1/4", (1, 4)),
    }
    flags = {"compression": ("--compress", "delta-blosc2"), "overwrite": ("--overwrite", True)}
    received: list[PackOptions] = []

    def remember(images: object, out: object, options: PackOptions, on_progress: object) -> None:
        received.append(options)
        raise ValueError("end")

    monkeypatch.setattr("msvae.cli.pack.pack_images", remember)
    names = {
        "wavelengths_nm": "--wavelengths",
        "tile_px": "--tile",
        "stride_px": "--stride",
        "num_workers": "--workers",
    }
    command = ["pack", tmp_path, "--out", tmp_path / "out", *(flag for flag, _ in flags.values())]
    for field, (text, _) in given.items():
        command += [names.get(field, f"--{field.replace('_', '-')}"), *(text.split() if field == "split" else [text])]
    run(*command)
    run("pack", tmp_path, "--out", tmp_path / "out", "--axes", " HWC", "--mask", "ndvi>0", "--tiling", "leaf")
    run("pack", tmp_path, "--out", tmp_path / "out", "--split-by", "block", "--merge")
    expected = {field: value for field, (_, value) in (given | flags).items()}
    assert received == [
        PackOptions(**expected),
        PackOptions(axes="hwc", mask="ndvi>0", tiling="leaf", num_workers=None),
        PackOptions(split_by="block", merge=True, num_workers=None),
    ]
    python_only = {"block_tiles", "tiles_per_shard"}
    tested = {*expected, "axes", "mask", "tiling", "split_by", "merge"}
    assert set(PackOptions.model_fields) == tested | python_only
