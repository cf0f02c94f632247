"""The bytes do not depend on processes, parts and killed runs, and finished work is not repeated."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import psutil
import pytest

from msvae.packing.options import PackOptions
from msvae.packing.pack import pack
from msvae.packing.workers import Workers

OPTIONS = {"tile_px": 16, "tiles_per_shard": 2, "seed": 3}
PACK = """
import json, sys
from pathlib import Path
from msvae.packing.pack import pack
from msvae.packing.options import PackOptions

if __name__ == "__main__":
    options = {name: tuple(v) if isinstance(v, list) else v for name, v in json.loads(sys.argv[3]).items()}
    pack([Path(sys.argv[1])], Path(sys.argv[2]), PackOptions(**options))
"""


@pytest.fixture
def leaves(tmp_path, leaf_image):
    for i in range(4):
        leaf_image(tmp_path / "leaves" / f"leaf{i}.tif", size_px=256 + 8 * i, seed=i)
    return tmp_path / "leaves"


@pytest.fixture
def start(tmp_path):
    script = tmp_path / "run_pack.py"
    script.write_text(PACK)

    def start_pack(images: Path, out: Path, **options: object) -> subprocess.Popen[str]:
        command = [sys.executable, str(script), str(images), str(out), json.dumps(OPTIONS | options)]
        return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)

    return start_pack


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def kill_once_shards_are_done(process: subprocess.Popen[str], out: Path, num_shards: int) -> dict[str, int]:
    """Kill the process when `num_shards` shards are finished, and return the inode of each finished shard."""
    data = out.with_name(f".{out.name}.partial") / "data"
    while len(list(data.glob("*/leaf-*.index.json"))) < num_shards:
        assert process.poll() is None, process.stderr.read()
    workers = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not psutil.wait_procs(workers, 60)[1], "workers end with their parent"
    assert not out.exists()
    done = {str(index.relative_to(data)).replace(".index.json", ".tar") for index in data.glob("*/leaf-*.index.json")}
    return {name: (data / name).stat().st_ino for name in done}


@pytest.mark.parametrize("tiling", [pytest.param("grid", marks=pytest.mark.slow), "leaf"])
def test_bytes_are_the_same_on_one_and_three_workers_and_in_two_parts(tmp_path, leaves, start, tiling):
    one, three, parts = (tmp_path / name for name in ("one", "three", "parts"))
    pack([leaves], one, PackOptions(tiling=tiling, **OPTIONS))
    assert start(leaves, three, tiling=tiling, num_workers=3).wait() == 0
    running = [start(leaves, parts, tiling=tiling, part=(i, 2)) for i in (1, 2)]
    assert [process.wait() for process in running] == [0, 0]
    assert not parts.exists()
    pack([leaves], parts, PackOptions(tiling=tiling, merge=True, **OPTIONS))
    assert len(files_of(one)) > 40
    assert files_of(one) == files_of(three) == files_of(parts)
    assert not list(tmp_path.glob(".*"))


def test_whole_image_masks_are_prepared_once_for_all_parts_and_count_as_progress(tmp_path, leaves, start):
    seen = {"mask": "otsu(ndvi)", "min_object_px": 8}
    one, two, parts = (tmp_path / name for name in ("one", "two", "parts"))
    counted: list[tuple[int, int]] = []
    pack([leaves], one, PackOptions(**OPTIONS, **seen), lambda *done_and_all: counted.append(done_and_all))
    assert [done for done, _ in counted] == sorted(done for done, _ in counted)
    assert counted[-1][0] == counted[-1][1]
    masking = sum(done <= counted[0][1] / 3 for done, _ in counted)
    assert masking > 8, "two passes for the threshold and one for cleaning, over four images"
    assert start(leaves, two, num_workers=2, **seen).wait() == 0
    pack([leaves], parts, PackOptions(part=(1, 2), **OPTIONS, **seen))
    masks = tmp_path / ".parts.partial" / "masks"
    made = {file.name: (file.stat().st_ino, file.stat().st_mtime_ns) for file in masks.iterdir()}
    assert len(made) == 8, "a threshold and a mask for each image, and no intermediate files"
    pack([leaves], parts, PackOptions(part=(2, 2), **OPTIONS, **seen))
    assert {file.name: (file.stat().st_ino, file.stat().st_mtime_ns) for file in masks.iterdir()} == made
    pack([leaves], parts, PackOptions(merge=True, **OPTIONS, **seen))
    assert files_of(one) == files_of(two) == files_of(parts)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("num_workers", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_a_killed_run_resumes_without_repeating_finished_shards(tmp_path, leaves, start, num_workers):
    out, whole = tmp_path / "out", tmp_path / "whole"
    pack([leaves], whole, PackOptions(**OPTIONS))
    done = kill_once_shards_are_done(start(leaves, out, num_workers=num_workers), out, 4)
    resumed = start(leaves, out, num_workers=num_workers)
    assert resumed.wait() == 0, resumed.stderr.read()
    assert files_of(out) == files_of(whole)
    assert {name: (out / name).stat().st_ino for name in done} == done
    assert not list(tmp_path.glob(".*"))


def test_a_killed_part_resumes_and_merging_an_unfinished_part_is_refused(tmp_path, leaves, start):
    out, whole = tmp_path / "out", tmp_path / "whole"
    pack([leaves], whole, PackOptions(**OPTIONS))
    pack([leaves], out, PackOptions(part=(2, 2), **OPTIONS))
    num_of_second = len(list((tmp_path / ".out.partial" / "data").glob("*/*.index.json")))
    kill_once_shards_are_done(start(leaves, out, part=(1, 2)), out, num_of_second + 3)
    with pytest.raises(ValueError, match=r"--merge but \d+ of \d+ shards are not made, such as train/leaf-0000"):
        pack([leaves], out, PackOptions(merge=True, **OPTIONS))
    assert not out.exists()
    pack([leaves], out, PackOptions(part=(1, 2), **OPTIONS))
    pack([leaves], out, PackOptions(merge=True, **OPTIONS))
    assert files_of(out) == files_of(whole)


def test_workers_end_when_the_run_that_started_them_is_killed(tmp_path, leaves, start):
    out = tmp_path / "out"
    process = start(leaves, out, num_workers=2)
    data = tmp_path / ".out.partial" / "data"
    while not list(data.glob("*/leaf-*.index.json")):
        assert process.poll() is None
    family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(family) >= 2
    assert psutil.wait_procs(family, timeout=60)[1] == []


def test_workers_do_not_run_the_script_that_called_pack(tmp_path, leaves):
    """The script has no `if __name__ == "__main__"`, and may be slow to import."""
    script, runs = tmp_path / "script.py", tmp_path / "runs"
    options = f"PackOptions(num_workers=2, **{OPTIONS})"
    script.write_text(
        f"""
from pathlib import Path
from msvae.packing.pack import pack
from msvae.packing.options import PackOptions
with open({str(runs)!r}, "a") as file:
    file.write("x")
pack([Path({str(leaves)!r})], Path({str(tmp_path / "out")!r}), {options})
"""
    )
    subprocess.run([sys.executable, script], check=True)
    assert runs.read_text() == "x"


def test_resuming_with_other_options_or_images_is_refused_with_the_differences(tmp_path, leaves, start):
    out = tmp_path / "out"
    kill_once_shards_are_done(start(leaves, out), out, 1)
    before = files_of(tmp_path)
    with pytest.raises(ValueError, match=r"out.partial holds unfinished work.*tile_px was 16, is 32.*delete"):
        pack([leaves], out, PackOptions(**(OPTIONS | {"tile_px": 32})))
    os.utime(leaves / "leaf1.tif", (1, 1))
    (leaves / "leaf2.tif").rename(tmp_path / "leaf2.tif")
    with pytest.raises(ValueError, match=r"leaf1\.tif has changed.*leaf2\.tif is left out") as caught:
        pack([leaves], out, PackOptions(**OPTIONS))
    assert "\n" not in str(caught.value)
    (tmp_path / "leaf2.tif").rename(leaves / "leaf2.tif")
    assert files_of(tmp_path) == before


def test_a_second_run_in_the_same_folder_is_refused(tmp_path, leaves, start):
    out = tmp_path / "out"
    running = start(leaves, out)
    os.kill(running.pid, signal.SIGSTOP) if wait_for(tmp_path / ".out.partial" / "record.json", running) else None
    try:
        with pytest.raises(ValueError, match=r"another run uses .*choose another --out"):
            pack([leaves], out, PackOptions(**OPTIONS))
    finally:
        os.kill(running.pid, signal.SIGCONT)
    assert running.wait() == 0


def wait_for(path: Path, process: subprocess.Popen[str]) -> bool:
    while not path.exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.001)
    return True


def test_merging_without_parts_is_refused_and_leaves_nothing(tmp_path, leaves):
    with pytest.raises(ValueError, match="no part was made"):
        pack([leaves], tmp_path / "out", PackOptions(merge=True, **OPTIONS))
    assert not list(tmp_path.glob(".*"))


def test_tiles_do_not_depend_on_the_strips_of_the_survey(tmp_path, leaves, monkeypatch):
    from msvae.packing import survey

    monkeypatch.setattr(survey, "MIN_READ_PX", 32)
    for name, strip_pixels in (("whole", 2**30), ("stripped", 1)):
        monkeypatch.setattr(survey, "STRIP_PIXELS", strip_pixels)
        pack([leaves], tmp_path / name, PackOptions(tiling="leaf", **OPTIONS))
    assert files_of(tmp_path / "whole") == files_of(tmp_path / "stripped")


def test_a_worker_process_names_a_damaged_image(tmp_path, leaves, write_raster):
    values = np.random.default_rng(0).integers(1, 10_000, (5, 192, 192), dtype=np.uint16)
    image = write_raster(leaves / "cut.tif", values, scale=0.0001, mask=np.ones((192, 192), bool))
    image.write_bytes(image.read_bytes()[:200_000])
    with pytest.raises(ValueError, match=r"cut\.tif cannot be (read|opened)"):
        pack([leaves], tmp_path / "out", PackOptions(num_workers=2, **OPTIONS))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_full_disk_is_reported_and_leaves_no_dataset(tmp_path, leaf_image, small_disk, num_workers):
    images = [leaf_image(tmp_path / f"leaf{i}.tif", size_px=128, seed=i) for i in range(4)]
    with pytest.raises(ValueError, match=r"No space left on device.*(free space|another folder)"):
        pack(images, small_disk / "out", PackOptions(tile_px=32, num_workers=num_workers))
    assert not (small_disk / "out").exists()
    pack(images, tmp_path / "out", PackOptions(tile_px=32))
    assert sum(path.stat().st_size for path in (tmp_path / "out").rglob("*.tar")) > 256_000


def test_unfinished_work_of_other_options_is_refused_and_kept(tmp_path, leaf_image):
    """The survey of that work may have taken hours."""
    image = leaf_image(tmp_path / "leaf.tif", size_px=64)
    pack([image], tmp_path / "out", PackOptions(**OPTIONS, part=(1, 2)))
    partial = tmp_path / ".out.partial"
    for index in partial.glob("data/*/*.index.json"):
        index.unlink()
    survey = {path: path.read_bytes() for path in (partial / "survey").iterdir()}
    assert survey
    with pytest.raises(ValueError, match="seed was 3, is 4"):
        pack([image], tmp_path / "out", PackOptions(**{**OPTIONS, "seed": 4}))
    assert {path: path.read_bytes() for path in (partial / "survey").iterdir()} == survey


def test_ctrl_c_while_tasks_are_handed_out_cancels_the_earlier_ones():
    """Otherwise the pool would finish all of them before it ends."""
    submitted: list[Future[None]] = []

    class Pool:
        def submit(self, *_: object) -> Future[None]:
            if len(submitted) == 2:
                raise KeyboardInterrupt
            submitted.append(Future())
            return submitted[-1]

    with pytest.raises(KeyboardInterrupt):
        Workers(None, lambda _: None, Pool()).run(None, [0, 1, 2])
    assert [task.cancelled() for task in submitted] == [True, True]
