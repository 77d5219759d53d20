"""Damping that changes during a run of the command line, and the clipping of its steps."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from tiny_runs import TINY_PERIOD, directory_of, metrics_without_times, tiny_config

from kfac_sua.training import loop
from kfac_sua.training.build import build_training
from kfac_sua.training.checkpoint import load_checkpoint
from kfac_sua.training.loop import run
from kfac_sua.training.step import adapt_damping
from kfac_sua.training.timing import Stopwatch

CPU = torch.device("cpu")


def last_damping(config) -> float:
    """Return the damping in the last checkpoint of a run."""
    directory = directory_of(config)
    state = load_checkpoint(directory.checkpoint, fingerprint=directory.fingerprint, seed=config.seed, device=CPU)
    return state.preconditioner["damping"]


def test_a_schedule_sets_the_damping_of_every_epoch(tmp_path, monkeypatch):
    """Each epoch trains with its own; the first and the last are those of the configuration."""
    seen, train_epoch = [], loop.train_epoch

    def watching(training, *rest):
        result = train_epoch(training, *rest)
        seen.append(training.preconditioner.damping)
        return result

    monkeypatch.setattr(loop, "train_epoch", watching)
    config = tiny_config(tmp_path, TINY_PERIOD, "preconditioner.damping_final=0.001", "epochs=3")
    run(config)
    assert seen == pytest.approx([0.1, 0.01, 0.001])
    assert last_damping(config) == 0.001


def test_adaptive_damping_moves(tmp_path, monkeypatch):
    """At a learning rate far too large it rises, by as many factors as there were judgements."""
    trainings, train_epoch = [], loop.train_epoch

    def watching(training, *rest):
        trainings.append(training)
        return train_epoch(training, *rest)

    monkeypatch.setattr(loop, "train_epoch", watching)
    config = tiny_config(tmp_path, TINY_PERIOD, "preconditioner.adaptive_damping=2", "epochs=2", "optimizer.lr=3")
    run(config)
    adaptive = trainings[-1].adaptive_damping
    assert adaptive.num_raised + adaptive.num_lowered > 0
    factor = (19 / 20) ** (2 * (adaptive.num_lowered - adaptive.num_raised))
    assert last_damping(config) == pytest.approx(0.1 * factor)
    assert adaptive.num_raised > adaptive.num_lowered


def test_its_seconds_belong_to_the_phases_of_training(tmp_path):
    """The additional forward pass is forward time, the judgement application time, on a clock that ticks when read."""
    ticks = itertools.count()
    training = build_training(tiny_config(tmp_path, TINY_PERIOD, "preconditioner.adaptive_damping=2"), CPU)
    training.watch = Stopwatch(CPU, clock=lambda: float(next(ticks)))
    inputs, labels = next(iter(training.loader.epoch(0, 0)))
    loss = F.cross_entropy(training.model(inputs), labels)
    loss.backward()
    training.preconditioner.step()
    before = training.watch.totals()
    adapt_damping(training, inputs, labels, loss)
    added = {name: seconds - before[name] for name, seconds in training.watch.totals().items()}
    assert {name for name, seconds in added.items() if seconds} == {"forward_backward", "application"}
    assert not training.adaptive_damping.is_due


def test_a_clip_that_never_binds_changes_nothing_and_a_tight_one_does(tmp_path):
    """With an enormous bound the records are those without, to the last digit; with a tiny one training stalls."""
    weight = (TINY_PERIOD, "preconditioner.application=weight", "epochs=2")
    without = tiny_config(tmp_path, *weight)
    loose, tight = (tiny_config(tmp_path, *weight, f"preconditioner.kl_clip={kappa}") for kappa in ("1e9", "1e-12"))
    for config in (without, loose, tight):
        run(config)
    scales = [row.pop("kl_scale") for config in (loose, without) for row in metrics_without_times(config)]
    assert scales[1:3] == [1.0, 1.0]
    assert all(math.isnan(scale) for scale in (scales[0], *scales[3:]))
    rows = [[row | {"kl_scale": 0} for row in metrics_without_times(config)] for config in (loose, without)]
    assert rows[0] == rows[1]
    assert 0 < metrics_without_times(tight)[-1]["kl_scale"] < 1e-3
    assert metrics_without_times(tight)[-1]["train_loss"] > 1.05 * metrics_without_times(without)[-1]["train_loss"]


def test_adapting_with_bounds_that_hold_the_damping_changes_nothing(tmp_path, monkeypatch):
    """The judgement itself leaves no trace in training: batch normalisation and the order of images among it."""
    plain = tiny_config(tmp_path, TINY_PERIOD, "epochs=2")
    adaptive = tiny_config(tmp_path, TINY_PERIOD, "epochs=2", "preconditioner.adaptive_damping=1")
    monkeypatch.setattr("kfac_sua.preconditioner.adaptive_damping.direction", lambda *args: 0)
    for config in (plain, adaptive):
        run(config)
    got, want = metrics_without_times(adaptive), metrics_without_times(plain)
    for row, expected in zip(got, want, strict=True):
        # The judged steps are applied to the weight gradient.
        assert row == pytest.approx(expected, rel=1e-3, nan_ok=True)
