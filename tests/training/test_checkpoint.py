"""Checkpoints: atomic, exact, and refused where they do not belong."""

import dataclasses
import hashlib
import io
from pathlib import Path

import pytest
import torch
from identical import assert_identical

import kfac_sua.training.checkpoint as checkpoint_module
from kfac_sua.training.checkpoint import Checkpoint, CheckpointError, load_checkpoint, previous_path, save_checkpoint

CPU = torch.device("cpu")


@pytest.fixture
def checkpoint() -> Checkpoint:
    """Return a state with tensors at every depth that real ones have."""
    return Checkpoint(
        fingerprint="a" * 64,
        seed=3,
        data_digest="d" * 64,
        records_digest="e" * 64,
        epoch=2,
        batch=3,
        step=11,
        skipped_steps=1,
        model={"weight": torch.arange(6.0).reshape(2, 3)},
        optimizer={"state": {0: {"momentum_buffer": torch.ones(2)}}, "param_groups": [{"lr": 0.1, "params": [0]}]},
        preconditioner={"version": 1, "layers": {"fc": {"blocks": torch.eye(2)[None], "count": 3, "mean": None}}},
        sums={"loss_sum": torch.tensor(2.5), "num_errors": torch.tensor(3), "num_images": 30},
        diagnostics={"num_looks": 1, "sums": torch.ones(4)},
        times={"forward_backward": 1.5},
    )


def load(path, **changes):
    """Load as the run that wrote the fixture would."""
    return load_checkpoint(path, **({"fingerprint": "a" * 64, "seed": 3, "device": CPU} | changes))


def test_round_trip(tmp_path, checkpoint):
    """What is loaded equals what was saved, to the last bit."""
    path = tmp_path / "checkpoint.state"
    save_checkpoint(path, checkpoint)
    loaded = load(path)
    assert_identical(vars(loaded), vars(checkpoint))
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.state"]


def test_a_checkpoint_of_before_diagnostics_is_read(tmp_path, checkpoint, monkeypatch):
    """A file without them is sound; one that lacks anything else is not."""
    path, written = tmp_path / "checkpoint.state", []
    save = torch.save
    monkeypatch.setattr(checkpoint_module.torch, "save", lambda values, file: save(without(values, written[0]), file))
    for name in ("diagnostics", "sums"):
        written[:] = [name]
        save_checkpoint(path, checkpoint)
        if name == "diagnostics":
            assert_identical(vars(load(path)), vars(checkpoint) | {"diagnostics": None})
    previous_path(path).unlink()
    with pytest.raises(CheckpointError, match="is not a checkpoint of format 2"):
        load(path)


def without(values: dict, name: str) -> dict:
    """Return all entries but one."""
    return {key: value for key, value in values.items() if key != name}


def test_a_crash_while_writing_leaves_the_old_file(tmp_path, checkpoint, monkeypatch):
    """If the process dies half-way through writing, the previous checkpoint is still whole."""
    path = tmp_path / "checkpoint.state"
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
    path = tmp_path / "checkpoint.state"
    (tmp_path / "checkpoint.state.tmp").write_bytes(b"torn")
    save_checkpoint(path, checkpoint)
    assert load(path).epoch == 2
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.state"]


@pytest.mark.parametrize(
    ("change", "shown"), [({"fingerprint": "b" * 64}, "bbbbbbbb, seed 3"), ({"seed": 4}, "seed 4")]
)
def test_checkpoint_of_another_run_is_refused(tmp_path, checkpoint, change, shown):
    """A checkpoint copied from another configuration or seed is named and refused."""
    path = tmp_path / "checkpoint.state"
    save_checkpoint(path, checkpoint)
    with pytest.raises(CheckpointError, match=f"belongs to another run .*{shown}.*move it away"):
        load(path, **change)


def test_the_one_before_stays_and_is_used_if_the_last_is_damaged(tmp_path, checkpoint, capsys):
    """Of two generations, the sound one is taken, with a line that says so."""
    path = tmp_path / "checkpoint.state"
    for step in (11, 12, 13):
        save_checkpoint(path, dataclasses.replace(checkpoint, step=step))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["checkpoint.previous.state", "checkpoint.state"]
    assert load(path).step == 13
    path.write_bytes(path.read_bytes()[:-1])
    assert load(path).step == 12
    assert (tmp_path / "checkpoint.damaged.state").exists()
    assert "checkpoint.state is damaged" in (shown := capsys.readouterr().err)
    assert shown.endswith("Going on from checkpoint.previous.state.\n")
    # Now the last one is missing, as after a crash between two renames.
    assert load(path).step == 12
    assert "checkpoint.state is missing" in capsys.readouterr().err
    previous_path(path).write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"checkpoint.previous.state is damaged"):
        load(path)


def test_a_run_without_checkpoints_has_none(tmp_path):
    """Neither file: the run starts from the beginning."""
    assert load(tmp_path / "checkpoint.state") is None


def test_every_flipped_bit_is_noticed(tmp_path, checkpoint):
    """Wherever a bit is wrong, the file is refused: no parameter is ever silently another."""
    path = tmp_path / "checkpoint.state"
    save_checkpoint(path, checkpoint)
    content = path.read_bytes()
    for position in range(0, len(content), 37):
        path.write_bytes(content[:position] + bytes([content[position] ^ 4]) + content[position + 1 :])
        with pytest.raises(CheckpointError, match="damaged"):
            load(path)


def test_what_the_disk_does_not_hold_is_no_checkpoint(tmp_path, checkpoint, monkeypatch):
    """A file that does not read back as it was written never takes the place of the last one."""
    path = tmp_path / "checkpoint.state"
    save_checkpoint(path, checkpoint)
    monkeypatch.setattr(checkpoint_module, "_payload", lambda _: b"something else")
    with pytest.raises(CheckpointError, match="does not hold what was written to it; check the disk"):
        save_checkpoint(path, dataclasses.replace(checkpoint, step=12))
    monkeypatch.undo()
    assert load(path).step == 11
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.state"]


def test_other_images_are_refused(tmp_path, checkpoint):
    """A data file that has been exchanged since is named as the reason."""
    path = tmp_path / "checkpoint.state"
    save_checkpoint(path, checkpoint)
    assert load(path, data_digest="d" * 64).step == 11
    with pytest.raises(CheckpointError, match=r"trained on other images than dataset.data_dir holds now; restore"):
        load(path, data_digest="e" * 64)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", None])
def test_damaged_checkpoint_is_one_sentence(tmp_path, checkpoint, content):
    """An empty, foreign or truncated file is named together with the cure."""
    path = tmp_path / "checkpoint.state"
    save_checkpoint(path, checkpoint)
    path.write_bytes(path.read_bytes()[:400] if content is None else content)
    with pytest.raises(
        CheckpointError, match=r"checkpoint.state is damaged or not a checkpoint of format 2; move it away"
    ) as caught:
        load(path)
    assert "\n" not in str(caught.value)


def write(path, values):
    """Write any values as if they were a checkpoint, digest included."""
    payload = io.BytesIO()
    torch.save(values, payload)
    path.write_bytes(checkpoint_module.MAGIC + hashlib.sha256(payload.getvalue()).digest() + payload.getvalue())


@pytest.mark.parametrize("values", [[1, 2], {"format_version": 0}, {"format_version": 2, "epoch": 3}])
def test_other_format_is_refused(tmp_path, values):
    """A file of another version, or one that lacks keys, is refused."""
    path = tmp_path / "checkpoint.state"
    write(path, values)
    with pytest.raises(CheckpointError, match="is not a checkpoint of format 2"):
        load(path)


@pytest.mark.parametrize(("name", "value"), [("epoch", "x"), ("batch", -5), ("model", []), ("times", None)])
def test_values_of_another_type_are_refused(tmp_path, checkpoint, name, value):
    """A file with a sound digest but wrong types or negative counts is no checkpoint."""
    path = tmp_path / "checkpoint.state"
    values = {**vars(checkpoint), "format_version": 2, name: value}
    write(path, values)
    with pytest.raises(CheckpointError, match=rf"is not a checkpoint \({name} is "):
        load(path)


def test_lack_of_memory_says_nothing_against_a_checkpoint(tmp_path, checkpoint, monkeypatch):
    """The error comes through, so that the run fails and is tried again, from this very file."""
    path = tmp_path / "checkpoint.state"
    save_checkpoint(path, checkpoint)

    def full(*_, **__):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(checkpoint_module.torch, "load", full)
    with pytest.raises(torch.OutOfMemoryError):
        load(path)
    monkeypatch.undo()
    assert load(path).step == 11


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    """A pickle that would call a function is refused, though its digest be right."""

    class Malicious:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "code ran",))

    path = tmp_path / "checkpoint.state"
    write(path, {"format_version": 2, "model": Malicious()})
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        load(path)
    assert not (tmp_path / "code ran").exists()
