"""Checkpoints with a sound digest that no run has written: refused by the entry, so that the one before stands in."""

import copy
import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from thinned import diagonal, one_in
from tiny_runs import directory_of, tiny_config

from kfac_sua.optimizers import MuonWithAdamW
from kfac_sua.training.build import build_training
from kfac_sua.training.checkpoint import Checkpoint, CheckpointError, load_checkpoint, previous_path, save_checkpoint
from kfac_sua.training.fitting import check_fits
from kfac_sua.training.loop import run
from kfac_sua.training.progress import Progress
from kfac_sua.training.signals import Interrupted
from kfac_sua.training.state import Training

CPU = torch.device("cpu")

RUNS = {
    "sgd": ("preconditioner=sua", "schedule=cosine"),
    "baseline": ("preconditioner=baseline", "optimizer.momentum=0", "schedule=step"),
    "adaptive": ("preconditioner=kfac", "preconditioner.adaptive_damping=2", "optimizer.lr=0.1"),
    "scheduled": ("preconditioner=grouped", "preconditioner.damping_final=0.01", "non_finite=skip"),
    "adamw": ("preconditioner=baseline", "optimizer=adamw", "schedule=cosine"),
    "muon": ("preconditioner=baseline", "optimizer=muon", "schedule=cosine"),
}

VALUES = [None, "text", True, -1, 1e9, 10**9, 10**5000, math.nan, math.inf, [], {}, {"a": 1}, torch.ones(3)]

Path = tuple[Any, ...]


def start(tmp_path, name: str) -> Training:
    """Return a training before its first step."""
    return build_training(tiny_config(tmp_path, *RUNS[name], "epochs=3"), CPU)


def trained(tmp_path, name: str, num_epochs: int, num_batches: int) -> Checkpoint:
    """Return the checkpoint of a training after so many epochs and mini-batches, which writes nothing anywhere."""
    del tmp_path
    return copy.deepcopy(_trained(name, num_epochs, num_batches))


@functools.cache
def _trained(name: str, num_epochs: int, num_batches: int) -> Checkpoint:
    """Train once what many tests take a copy of."""
    training = start("unused", name)
    for _ in range(num_epochs):
        take(training, len(training.loader))
        training.end_epoch()
    if num_batches:
        take(training, num_batches)
    checkpoint = copy.deepcopy(training.checkpoint("f" * 64, "e" * 64))
    training.close()
    return checkpoint


def take(training: Training, num_batches: int) -> None:
    """Take so many mini-batches of an epoch."""
    training.begin_epoch()
    for _ in range(num_batches):
        training.take_step()
        training.batch += 1


def exchanged(state: Any, path: Path, value: Any) -> Any:
    """Return nested mappings and lists with another value at a path."""
    if not path:
        return value
    changed = copy.copy(state)
    changed[path[0]] = exchanged(state[path[0]], path[1:], value)
    return changed


def entries(state: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Yield every entry of nested mappings and lists, these included."""
    for key, value in state.items() if isinstance(state, Mapping) else enumerate(state):
        yield (*path, key), value
        if isinstance(value, Mapping | list):
            yield from entries(value, (*path, key))


def changed_at(checkpoint: Checkpoint, path: Path, value: Any) -> Checkpoint:
    """Return a checkpoint with another value at a path."""
    name, *rest = path
    return dataclasses.replace(checkpoint, **{name: exchanged(getattr(checkpoint, name), tuple(rest), value)})


@pytest.mark.parametrize(("name", "position"), diagonal(RUNS, [(0, 0), (0, 2), (1, 0), (1, 4), (3, 0)]), ids=str)
def test_what_a_run_writes_fits(tmp_path, name, position):
    """Between epochs, within them, before the first and after the last, under every optimizer and schedule."""
    check_fits(start(tmp_path, name), trained(tmp_path, name, *position))


def is_harmless(path: Path, value: Any, own: Any) -> bool:
    """Whether a checkpoint may have another value there."""
    name, is_number = path[-1], type(value) in (int, float)
    if path[0] == "times":  # measured: any machine may have taken as long
        return len(path) == 2 and is_number and 0 <= value < 2**64
    if path[0] == "preconditioner":
        return True  # of its entries the preconditioner's own tests tell
    if name in ("foreach", "fused", "capturable"):  # not taken over, or of no consequence here
        return True
    if name == "params":
        return value == own
    if name == "momentum_buffer":
        return value is None and own is None
    is_alike = type(value) is type(own) or is_number
    return is_alike and not isinstance(own, torch.Tensor) and value == own


@pytest.mark.parametrize("name", one_in(2, RUNS))
def test_every_entry_is_checked(tmp_path, name):
    """What stands in for an entry is refused with a ValueError, whatever it is, and the training is left alone."""
    training, checkpoint = start(tmp_path, name), trained(tmp_path, name, 1, 2)
    num_steps = checkpoint.step
    num_refused = 0
    for field in ("step", "epoch", "batch", "skipped_steps"):
        for value in (10**9, getattr(checkpoint, field) + 1):
            with pytest.raises(ValueError, match=r"^(step|epoch|batch|skipped_steps) is \d+, expected "):
                check_fits(training, dataclasses.replace(checkpoint, **{field: value}))
    for field in ("times", "sums", "diagnostics", "model", "optimizer"):
        for path, own in entries({field: getattr(checkpoint, field)}):
            for value in VALUES:
                if len(path) == 1 and not isinstance(value, dict):
                    continue  # refused by its type where the file is read
                changed = changed_at(checkpoint, path, value)
                if is_harmless(path, value, own):
                    check_fits(training, changed)
                    continue
                with pytest.raises(ValueError, match=r" is .*, expected |belongs to another network") as caught:
                    check_fits(training, changed)
                assert "\n" not in str(caught.value), path
                assert len(str(caught.value)) < 500
                num_refused += 1
    assert num_refused > 100
    assert checkpoint.step == num_steps
    check_fits(training, checkpoint)


BAD_ENTRIES = {
    "looks": ("diagnostics.num_looks", 3, r"diagnostics.num_looks is 3, expected a whole number in \[0, 2\]"),
    "cosine": (
        "diagnostics.sums",
        torch.tensor([1.0, 1.0, 1.5, 1.0], dtype=torch.float64),
        r"diagnostics.sums is \[1.0, 1.0, 1.5, 1.0\], expected sums of 0 norms",
    ),
    "decay": ("optimizer.param_groups.0.weight_decay", 5.0, r"weight_decay is 5.0, expected 0.0, as the run has it"),
    "momentum": ("optimizer.param_groups.0.momentum", 0.5, r"momentum is 0.5, expected 0.9, as the run has it"),
    "rate": ("optimizer.param_groups.0.lr", 7.0, r"lr is 7.0, expected 0.\d+, as the run has it"),
    "buffer": (
        "optimizer.state.0.momentum_buffer",
        torch.ones(3),
        r"shape \[3\], expected a tensor of shape \[16, 3, 3, 3\]",
    ),
    "seconds": ("times.statistics", -1.0, r"times.statistics is -1.0, expected a number of seconds ≥ 0"),
    "loss": (
        "sums.loss_sum",
        torch.tensor(-1.0, dtype=torch.float64),
        r"sums.loss_sum is .*, expected a sum of losses",
    ),
    "images": ("sums.num_images", 10**9, r"sums.num_images is 1000000000, expected 200"),
    "steps": ("preconditioner.num_steps", 10**9, r"num_steps is 1000000000, expected 6, as many as the run's"),
    "seed": ("preconditioner.seed", 8, r"preconditioner.seed is 8, expected 0, the run's"),
    "damping": ("preconditioner.damping", 1e9, r"preconditioner.damping is 1000000000.0, expected 0.\d+, as the run"),
    "state": ("preconditioner.layers", {}, r"Preconditioner state belongs to another model"),
}


@pytest.mark.parametrize("case", BAD_ENTRIES)
def test_an_entry_is_named_with_value_and_expectation(tmp_path, case):
    """The sentence says what it is and what the run would have."""
    text, value, said = BAD_ENTRIES[case]
    path = tuple(int(key) if key.isdigit() else key for key in text.split("."))
    changed = changed_at(trained(tmp_path, "sgd", 1, 2), path, value)
    with pytest.raises(ValueError, match=said):
        check_fits(start(tmp_path, "sgd"), changed)


def test_numbers_must_be_finite_between_epochs_alone(tmp_path):
    """An epoch ends with finite losses; within it training may have begun to diverge, which its end will tell."""
    for position in ((1, 0), (1, 2)):
        training, checkpoint = start(tmp_path, "sgd"), trained(tmp_path, "sgd", *position)
        for part in (checkpoint.model, checkpoint.optimizer["state"][0]):
            name = "classifier.weight" if "classifier.weight" in part else "momentum_buffer"
            changed, before = part[name].clone().fill_(math.nan), part[name]
            part[name] = changed
            if position == (1, 0):
                with pytest.raises(ValueError, match=f"{name} is not finite everywhere, expected finite numbers"):
                    check_fits(training, checkpoint)
            else:
                check_fits(training, checkpoint)
            part[name] = before


def test_the_checkpoint_before_stands_in(tmp_path, monkeypatch, capsys):
    """A run whose last checkpoint is made by hand goes on from the one before, and says why."""
    config = tiny_config(tmp_path, *RUNS["sgd"], "epochs=3")
    with monkeypatch.context() as context:
        context.setattr(Progress, "epoch", interrupt_after_two)
        with pytest.raises(Interrupted):
            run(config)
    directory = directory_of(config)
    place = {"fingerprint": directory.fingerprint, "seed": 0, "device": CPU}
    checkpoint = load_checkpoint(directory.checkpoint, **place)
    before = load_checkpoint(previous_path(directory.checkpoint), **place)
    checkpoint.optimizer["param_groups"][0]["weight_decay"] = 5.0
    save_checkpoint(directory.checkpoint, checkpoint)
    save_checkpoint(previous_path(directory.checkpoint), before)
    assert run(config).status == "finished"
    said = capsys.readouterr().err
    assert "checkpoint.state does not fit (optimizer.param_groups.0.weight_decay is 5.0, expected 0.0, as" in said
    assert "Going on from checkpoint.previous.state" in said


def interrupt_after_two(progress: Progress, record: Any) -> None:
    """Stop a run at the end of its second epoch."""
    del progress
    if record.epoch == 2:
        raise Interrupted("stopped", 2)


def test_alone_it_is_an_error(tmp_path):
    """Without one before, the sentence names the file and the cure."""
    training, checkpoint = start(tmp_path, "sgd"), trained(tmp_path, "sgd", 1, 2)
    path = tmp_path / "checkpoint.state"
    save_checkpoint(path, dataclasses.replace(checkpoint, step=10**9))
    with pytest.raises(CheckpointError, match=r"checkpoint.state does not fit \(step is 1000000000, .*\); move it"):
        load_checkpoint(
            path, fingerprint="f" * 64, seed=0, device=CPU, check=lambda loaded: check_fits(training, loaded)
        )


def test_a_refused_state_leaves_both_optimizers(tmp_path):
    """A state whose second part does not fit does not leave the first one changed."""
    training, checkpoint = start(tmp_path, "muon"), trained(tmp_path, "muon", 1, 0)
    optimizer = training.optimizer
    assert isinstance(optimizer, MuonWithAdamW)
    before = copy.deepcopy(optimizer.state_dict())
    for bad in ({}, None, {"muon": 1}, checkpoint.optimizer | {"adamw": checkpoint.optimizer["muon"]}):
        with pytest.raises(ValueError, match=r"must be a dict of muon, adamw|parameter group"):
            optimizer.load_state_dict(bad)
        assert optimizer.state_dict() == before
        assert [group["lr"] for group in optimizer.param_groups] == [
            part.param_groups[0]["lr"] for part in optimizer.parts.values()
        ]
    optimizer.load_state_dict(checkpoint.optimizer)
