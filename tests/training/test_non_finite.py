"""Mini-batches that are not finite: skipped without a trace, or the end of the run."""

import copy
import itertools
import json

import pytest
import torch
from identical import assert_identical
from thinned import diagonal
from tiny_runs import TINY_PERIOD, directory_of, tiny_config

from kfac_sua.data import BatchLoader
from kfac_sua.runs.metrics import read_records
from kfac_sua.training.build import build_training
from kfac_sua.training.loop import run
from kfac_sua.training.state import Training

SETTINGS = {
    "baseline": ("preconditioner=baseline",),
    "kfac": ("preconditioner=kfac", TINY_PERIOD),
    "sua-mc": ("preconditioner=sua", TINY_PERIOD, "preconditioner.fisher_type=mc"),
    "grouped-ema": (
        "preconditioner=grouped",
        "preconditioner.group_size=8",
        TINY_PERIOD,
        "preconditioner.ema_decay=0.9",
        "preconditioner.factor_period=1",
    ),
}


def start(tmp_path, *overrides: str) -> Training:
    """Return a run before its first step."""
    training = build_training(tiny_config(tmp_path, "non_finite=skip", *overrides), torch.device("cpu"))
    training.begin_epoch()
    return training


def step_on(training: Training, inputs: torch.Tensor, labels: torch.Tensor) -> None:
    """Take a step on this mini-batch."""
    training.loader.next_batch = lambda: (inputs, labels)
    training.take_step()


def spoil(monkeypatch, batches: set[int], value: float) -> None:
    """Put a value into one pixel of some of the training mini-batches of a run, counted over epochs."""
    next_batch, count = BatchLoader.next_batch, itertools.count()

    def spoiled_batch(loader):
        inputs, labels = next_batch(loader)
        if next(count) in batches:
            inputs[3, 1, 5, 7] = value
        return inputs, labels

    monkeypatch.setattr(BatchLoader, "next_batch", spoiled_batch)


# A mini-batch that is the first, one between refreshes, and one of a refresh.
@pytest.mark.parametrize(
    ("setting", "bad_step", "value"), diagonal(SETTINGS, [0, 1, 3], [float("nan"), float("inf"), 1e38])
)
def test_a_skipped_mini_batch_leaves_no_trace(tmp_path, setting, bad_step, value):
    """Steps with a spoiled mini-batch in between equal, bit for bit, the same steps without it."""
    with_bad, without = (start(tmp_path, *SETTINGS[setting]) for _ in range(2))
    batches = [(inputs.clone(), labels) for inputs, labels in with_bad.loader.epoch(0, 0)]
    for step, (inputs, labels) in enumerate(batches):
        if step == bad_step:
            spoiled = inputs.clone()
            spoiled[3, 1, 5, 7] = value
            step_on(with_bad, spoiled, labels)
            with_bad.batch += 1
        for training in (with_bad, without):
            step_on(training, inputs, labels)
            training.batch += 1
    got, want = (vars(training.checkpoint("f" * 64, "e" * 64)) for training in (with_bad, without))
    assert (got.pop("batch"), want.pop("batch")) == (len(batches) + 1, len(batches))
    assert (got.pop("skipped_steps"), want.pop("skipped_steps")) == (1, 0)
    for state in (got, want):
        del state["times"]
        if state["preconditioner"] is not None:
            del state["preconditioner"]["events"]
    assert_identical(got, want)


def test_the_run_goes_on_and_says_how_many_were_skipped(tmp_path, monkeypatch):
    """Two of eight mini-batches are skipped; the losses of the others are recorded, run.json counts."""
    config = tiny_config(tmp_path, "preconditioner=sua", TINY_PERIOD, "epochs=2", "non_finite=skip")
    spoil(monkeypatch, {2, 5}, float("nan"))
    info = run(config)
    assert (info.status, info.skipped_steps) == ("finished", 2)
    assert json.loads(directory_of(config).info.read_text())["skipped_steps"] == 2
    assert read_records(directory_of(config).metrics)[-1].step == 6


def test_by_default_the_run_ends_as_diverged(tmp_path, monkeypatch):
    """With non_finite=stop the same mini-batch is the end."""
    config = tiny_config(tmp_path, "preconditioner=sua", TINY_PERIOD, "epochs=2")
    spoil(monkeypatch, {2}, float("nan"))
    assert run(config).status == "diverged"


def test_an_epoch_without_a_finite_mini_batch_has_diverged(tmp_path, monkeypatch):
    """Skipping everything is not training."""
    config = tiny_config(tmp_path, "preconditioner=baseline", "epochs=2", "non_finite=skip")
    spoil(monkeypatch, {4, 5, 6, 7}, float("inf"))
    info = run(config)
    assert (info.status, info.diverged_at_epoch, info.skipped_steps) == ("diverged", 2, 4)


def test_a_step_that_is_not_skipped_is_the_same_under_both_policies(tmp_path):
    """Looking at the gradient changes nothing."""
    states = []
    for policy in ("skip", "stop"):
        config = tiny_config(tmp_path / policy, "preconditioner=kfac", TINY_PERIOD, f"non_finite={policy}")
        training = build_training(config, torch.device("cpu"))
        training.begin_epoch()
        for _ in range(len(training.loader)):
            training.take_step()
        states.append(copy.deepcopy(training.model.state_dict()))
    assert_identical(states[0], states[1])
