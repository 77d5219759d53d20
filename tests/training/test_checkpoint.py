"""Checkpoints: atomic, exact, and refused where they do not belong."""

import dataclasses

import pytest
import torch
from identical import assert_identical

import kfac_sua.training.checkpoint as checkpoint_module
from kfac_sua.training.checkpoint import Checkpoint, CheckpointError, load_checkpoint, save_checkpoint

CPU = torch.device("cpu")


@pytest.fixture
def checkpoint() -> Checkpoint:
    """Return a state with tensors at every depth that real ones have."""
    return Checkpoint(
        fingerprint="a" * 64,
        seed=3,
        epoch=2,
        step=8,
        model={"weight": torch.arange(6.0).reshape(2, 3)},
        optimizer={"state": {0: {"momentum_buffer": torch.ones(2)}}, "param_groups": [{"lr": 0.1, "params": [0]}]},
        preconditioner={"version": 1, "layers": {"fc": {"blocks": torch.eye(2)[None], "count": 3, "mean": None}}},
        times={"forward_backward": 1.5},
    )


def load(path, **changes):
    """Load as the run that wrote the fixture would."""
    return load_checkpoint(path, **({"fingerprint": "a" * 64, "seed": 3, "device": CPU} | changes))


def test_round_trip(tmp_path, checkpoint):
    """What is loaded equals what was saved, to the last bit."""
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, checkpoint)
    loaded = load(path)
    assert_identical(vars(loaded), vars(checkpoint))
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_a_crash_while_writing_leaves_the_old_file(tmp_path, checkpoint, monkeypatch):
    """If the process dies half-way through writing, the previous checkpoint is still whole."""
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, checkpoint)

    def torn_save(values, file):
        file.write(b"half a file")
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint_module.torch, "save", torn_save)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(path, dataclasses.replace(checkpoint, epoch=3))
    assert load(path).epoch == 2


def test_next_save_clears_up_after_a_crash(tmp_path, checkpoint):
    """A temporary file left by a crash is overwritten and renamed."""
    path = tmp_path / "checkpoint.pt"
    (tmp_path / "checkpoint.pt.tmp").write_bytes(b"torn")
    save_checkpoint(path, checkpoint)
    assert load(path).epoch == 2
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pt"]


@pytest.mark.parametrize(
    ("change", "shown"), [({"fingerprint": "b" * 64}, "bbbbbbbb, seed 3"), ({"seed": 4}, "seed 4")]
)
def test_checkpoint_of_another_run_is_refused(tmp_path, checkpoint, change, shown):
    """A checkpoint copied from another configuration or seed is named and refused."""
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, checkpoint)
    with pytest.raises(CheckpointError, match=f"belongs to another run .*{shown}.*move it away"):
        load(path, **change)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", None])
def test_damaged_checkpoint_is_one_sentence(tmp_path, checkpoint, content):
    """An empty, foreign or truncated file is named together with the cure."""
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, checkpoint)
    path.write_bytes(path.read_bytes()[:400] if content is None else content)
    with pytest.raises(
        CheckpointError, match=r"checkpoint.pt is damaged or not a checkpoint \(.+\); move it away"
    ) as caught:
        load(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("values", [[1, 2], {"format_version": 0}, {"format_version": 1, "epoch": 3}])
def test_other_format_is_refused(tmp_path, values):
    """A file of another version, or one that lacks keys, is refused."""
    path = tmp_path / "checkpoint.pt"
    torch.save(values, path)
    with pytest.raises(CheckpointError, match="is not a checkpoint of format 1"):
        load(path)


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    """A pickle that would call a function is refused."""

    class Malicious:
        def __reduce__(self):
            return (print, ("code ran",))

    path = tmp_path / "checkpoint.pt"
    torch.save({"format_version": 1, "model": Malicious()}, path)
    with pytest.raises(CheckpointError, match="damaged or not a checkpoint"):
        load(path)
