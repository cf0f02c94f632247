"""Choice of the checkpoint from which a run resumes."""

import pytest
import torch

from msvae.config import load_config
from msvae.training import checkpoints
from msvae.training.resume import choose_checkpoint


def save(out, step, resume):
    state = {"score": None, "config": {"train": {"resume": resume}}}
    return checkpoints.write(out, step, {"model/weight": torch.zeros(1)}, state, keep=9)


@pytest.fixture
def earlier(tmp_path):
    return save(tmp_path / "earlier", 3, "auto")


def config_of(out, resume):
    return load_config(None, ["--data.train", "shards", "--out", str(out), "--train.resume", str(resume)])


def test_a_branch_starts_at_the_named_checkpoint(earlier, tmp_path):
    assert choose_checkpoint(config_of(tmp_path / "branch", earlier)) == (earlier, [])


def test_a_branch_that_is_started_again_resumes_from_its_own_newest_checkpoint(earlier, tmp_path):
    newest = [save(tmp_path / "branch", step, str(earlier)) for step in (6, 9)][-1]
    assert choose_checkpoint(config_of(tmp_path / "branch", earlier)) == (newest, [])
    (newest / checkpoints.TENSORS).write_bytes(b"torn")
    path, damages = choose_checkpoint(config_of(tmp_path / "branch", earlier))
    assert path.name == "step-00000006"
    assert len(damages) == 1
    assert str(newest) in damages[0]


def test_a_branch_never_overwrites_later_checkpoints_of_another_run(earlier, tmp_path):
    later = save(tmp_path / "earlier", 6, "auto")
    with pytest.raises(ValueError, match=f"continues to {later.name} after {earlier.name}; .*another `out`"):
        choose_checkpoint(config_of(tmp_path / "earlier", earlier))


def test_a_named_checkpoint_that_is_damaged_is_refused(earlier, tmp_path):
    (earlier / checkpoints.STATE).write_text("{}")
    with pytest.raises(ValueError, match=r"state\.json is damaged"):
        choose_checkpoint(config_of(tmp_path / "branch", earlier))
