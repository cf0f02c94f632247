"""Checkpoints are written in a thread while training continues, one after another."""

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
    """Hold back all writes until the event is set. Return the event and the list of started writes."""
    let, write, begun = threading.Event(), checkpoints.write, []

    def wait_and_write(*arguments):
        begun.append(arguments[1])
        assert let.wait(60)
        return write(*arguments)

    monkeypatch.setattr(checkpoints, "write", wait_and_write)
    return let, begun


def saved(out):
    return sorted(path.name for path in (out / checkpoints.FOLDER).iterdir() if path.name.startswith("step"))


def test_training_continues_while_a_checkpoint_is_written_and_does_not_change_it(tmp_path, disk):
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


def test_on_a_slow_disk_the_next_checkpoint_waits_and_the_waiting_time_is_returned(tmp_path, disk):
    let, begun = disk
    writer = CheckpointWriter(tmp_path, keep=9, on_written=lambda: None)
    writer.save(3, [("model/weight", torch.zeros(4))], STATE)
    threading.Timer(0.5, let.set).start()
    waited_s = writer.save(6, [("model/weight", torch.ones(4))], STATE)
    assert waited_s > 0.2
    writer.close()
    assert begun == [3, 6]
    assert saved(tmp_path) == ["step-00000003", "step-00000006"]
