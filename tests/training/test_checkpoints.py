"""Checkpoints are written beside the steps, one after the other."""

from __future__ import annotations

import threading

import pytest
import torch
from safetensors.torch import load_file

from msvae.training import checkpoints
from msvae.training.checkpoints import CheckpointWriter

STATE = {"score": None}


@pytest.fixture
def disk(monkeypatch):
    """Writes nothing before it is let; how many writes were begun."""
    let, write, begun = threading.Event(), checkpoints.write, []

    def wait_and_write(*arguments):
        begun.append(arguments[1])
        assert let.wait(60)
        return write(*arguments)

    monkeypatch.setattr(checkpoints, "write", wait_and_write)
    return let, begun


def saved(out):
    return sorted(path.name for path in (out / checkpoints.FOLDER).iterdir() if path.name.startswith("step"))


def test_a_step_goes_on_while_its_checkpoint_is_written_and_a_later_copy_does_not_change_it(tmp_path, disk):
    let, _ = disk
    writer = CheckpointWriter(tmp_path, keep=9, on_written=lambda: None)
    weight = torch.full((4,), 1.0)
    writer.save(3, [("model/weight", weight)], STATE)
    weight.fill_(2.0)
    assert not (tmp_path / checkpoints.FOLDER).exists() or saved(tmp_path) == []
    let.set()
    writer.close()
    assert saved(tmp_path) == ["step-00000003"]
    tensors = load_file(tmp_path / checkpoints.FOLDER / "step-00000003" / checkpoints.TENSORS)
    assert torch.equal(tensors["model/weight"], torch.full((4,), 1.0))


def test_a_disk_slower_than_the_interval_makes_the_next_checkpoint_wait_and_says_for_how_long(tmp_path, disk):
    let, begun = disk
    writer = CheckpointWriter(tmp_path, keep=9, on_written=lambda: None)
    writer.save(3, [("model/weight", torch.zeros(4))], STATE)
    threading.Timer(0.5, let.set).start()
    waited_s = writer.save(6, [("model/weight", torch.ones(4))], STATE)
    assert waited_s > 0.2
    writer.close()
    assert begun == [3, 6]
    assert saved(tmp_path) == ["step-00000003", "step-00000006"]
