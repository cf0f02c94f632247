"""README and docs: targets of links exist, and the commands of each page run in order, with smaller data."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import ROOT, tiny_run

PAGES = sorted(
    str(path.relative_to(ROOT))
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "shards" / "README.md", *ROOT.glob("docs/*.md"))
)
SMALLER = (
    (r"msvae synth leaves --images 24", "msvae synth leaves --images 8 --size 96"),
    (r"--tile (128|256)", "--tile 32"),
    (r"launch/quickstart\.sh", f"{ROOT}/launch/quickstart.sh --steps 2"),
    (r"train/train\.py (?!--help)", "train/train.py --train.max_steps 2 --train.eval_every 0 "),
    (r"tensorboard (--logdir \S+)", r"tensorboard --inspect \1"),
    (r"configs/train/sd3\.yaml", "configs/train/quickstart.yaml"),
    (r"configs/accelerate/multi_gpu\.yaml", "configs/accelerate/cpu.yaml"),
    (r"export AWS_ACCESS_KEY_ID=…[^#\n]*", "true "),
    (r"s3://bucket/", "s3://leaves/"),
)
"""Replacements in commands for which a test has no time, machine or account: pattern, replacement."""
NOT_RUN = {
    r"bash launch/test\.sh.*": "runs this test",
}
"""Commands that this test does not run, and why."""


def text(page: str) -> str:
    return (ROOT / page).read_text()


def commands(page: str) -> str:
    """Return all shell commands of a page, in order."""
    return "\n".join(re.findall(r"```bash\n(.*?)```", text(page), flags=re.DOTALL))


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_targets_of_links_and_pictures_exist(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", text(page)):
        if "://" not in target:
            path, _, anchor = target.partition("#")
            file = (ROOT / page).parent / path if path else ROOT / page
            assert file.exists(), f"{page} links to {target}"
            assert not anchor or anchor in anchors(file), f"{page} links to {target}"


@pytest.fixture(scope="session")
def model(leaf_shards, tmp_path_factory, launch) -> Path:
    """Train for two steps, and return the folder of the run."""
    out = tmp_path_factory.mktemp("documented") / "leaves"
    done = launch(ROOT / "train" / "train.py", *tiny_run(leaf_shards, out, train__max_steps=2), processes=1)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """Return a folder with the files of a clone, without its history."""
    for name in ("launch", "train", "configs", "examples", "bench", "docs"):
        if (ROOT / name).exists():
            (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


Prepare = Callable[[Path], None]


@pytest.fixture
def prepared(leaf_images, leaf_shards, model, request) -> dict[str, Prepare]:
    """Return functions that create the files which a page expects from earlier pages, by name."""

    def images(clone: Path) -> None:
        for name in ("my/leaves", "leaves"):
            shutil.copytree(leaf_images, clone / name)

    def shards(clone: Path) -> None:
        shutil.copytree(leaf_shards, clone / "shards" / "leaves")

    def run(clone: Path) -> None:
        shutil.copytree(model, clone / "runs" / "leaves")

    def other(clone: Path) -> None:
        shutil.copytree(model, clone / "runs" / "other")

    def field(clone: Path) -> None:
        (clone / "field").symlink_to(request.getfixturevalue("rice"))
        shutil.copytree(leaf_images, clone / "my" / "leaves")

    def bucket(clone: Path) -> None:
        request.getfixturevalue("documented_bucket")

    return {"images": images, "shards": shards, "run": run, "other": other, "field": field, "bucket": bucket}


@pytest.fixture
def documented_bucket(leaf_shards, monkeypatch):
    from .servers import s3_server, set_credentials

    with s3_server(leaf_shards, "leaves") as (host, port):
        set_credentials(monkeypatch, f"http://{host}:{port}")
        yield


PREPARED = {
    "README.md": ("field",),
    "docs/curves.md": ("run",),
    "docs/data.md": (),
    "docs/evaluation.md": ("shards", "run", "other"),
    "docs/out.md": ("bucket",),
    "docs/steps.md": ("other",),
    "docs/training.md": ("shards",),
}
"""Pages whose commands are run here, and the names in `prepared` of the files that they need."""


TESTED_ELSEWHERE = {
    "docs/doctor.md": "tests/doctor/test_doctor.py",
    "docs/kubernetes.md": "tests/cluster/test_docs.py",
    "docs/machines.md": "tests/cluster/test_docs.py",
    "docs/skypilot.md": "tests/cluster/test_docs.py",
    "docs/slurm.md": "tests/cluster/test_docs.py",
    "docs/using.md": "tests/inference/test_using.py",
}
"""Pages whose commands need more than a folder, and the tests that run them."""


def test_the_commands_of_every_page_are_tested():
    assert {page for page in PAGES if commands(page).strip()} == PREPARED.keys() | TESTED_ELSEWHERE.keys()
    assert all(Path(page).stem in text(test) for page, test in TESTED_ELSEWHERE.items())


@pytest.mark.slow
@pytest.mark.parametrize("page", PREPARED)
def test_the_commands_of_a_page_run_in_order(page, clone, prepared):
    for name in PREPARED[page]:
        prepared[name](clone)
    script = commands(page)
    for command in NOT_RUN:
        script = re.sub(command, "", script)
    for pattern, replacement in SMALLER:
        script = re.sub(pattern, replacement, script)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", "-euxo", "pipefail", "-c", script],
        cwd=clone,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        timeout=540,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
