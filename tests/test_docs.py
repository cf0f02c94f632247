"""README and docs: links lead somewhere, and commands are run as a reader would, page by page, smaller and shorter."""

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
"""What a test has no time, machine or account for."""
ELSEWHERE = {
    r"bash launch/test\.sh.*": "runs this test",
}
"""Commands that are not run here, and why."""


def text(page: str) -> str:
    return (ROOT / page).read_text()


def commands(page: str) -> str:
    """All of a page, in order."""
    return "\n".join(re.findall(r"```bash\n(.*?)```", text(page), flags=re.DOTALL))


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_and_pictures_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", text(page)):
        if "://" not in target:
            path, _, anchor = target.partition("#")
            place = (ROOT / page).parent / path if path else ROOT / page
            assert place.exists(), f"{page} names {target}"
            assert not anchor or anchor in anchors(place), f"{page} names {target}"


@pytest.fixture(scope="session")
def model(leaf_shards, tmp_path_factory, launch) -> Path:
    """A run of two steps."""
    out = tmp_path_factory.mktemp("documented") / "leaves"
    done = launch(ROOT / "train" / "train.py", *tiny_run(leaf_shards, out, train__max_steps=2), processes=1)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """What a clone holds, without its history."""
    for name in ("launch", "train", "configs", "examples", "bench", "docs"):
        if (ROOT / name).exists():
            (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


Prepare = Callable[[Path], None]


@pytest.fixture
def prepared(leaf_images, leaf_shards, model, request) -> dict[str, Prepare]:
    """What a page takes from the pages before it."""

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


NEEDS = {
    "README.md": ("field",),
    "docs/curves.md": ("run",),
    "docs/data.md": (),
    "docs/evaluation.md": ("shards", "run", "other"),
    "docs/out.md": ("bucket",),
    "docs/steps.md": ("other",),
    "docs/training.md": ("shards",),
}


OTHERS = {
    "docs/doctor.md": "tests/doctor/test_doctor.py",
    "docs/kubernetes.md": "tests/cluster/test_docs.py",
    "docs/machines.md": "tests/cluster/test_docs.py",
    "docs/skypilot.md": "tests/cluster/test_docs.py",
    "docs/slurm.md": "tests/cluster/test_docs.py",
    "docs/using.md": "tests/inference/test_using.py",
}
"""Pages whose commands want more than a folder, and the tests that see to them."""


def test_the_commands_of_every_page_are_tested():
    assert {page for page in PAGES if commands(page).strip()} == NEEDS.keys() | OTHERS.keys()
    assert all(Path(page).stem in text(test) for page, test in OTHERS.items())


@pytest.mark.slow
@pytest.mark.parametrize("page", NEEDS)
def test_commands_work_in_the_order_in_which_they_are_read(page, clone, prepared):
    for name in NEEDS[page]:
        prepared[name](clone)
    script = commands(page)
    for command in ELSEWHERE:
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
