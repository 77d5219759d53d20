"""Norms, cosine and counts of a row are those of the steps that were taken, and measuring them leaves no trace."""

import contextlib
import math
from collections import Counter

import pytest
import torch
from emulated_runs import emulated  # noqa: F401  # a fixture
from identical import assert_identical
from thinned import diagonal
from tiny_runs import TINY_PERIOD, directory_of, tiny_config
from torch import nn

from kfac_sua.preconditioner import KroneckerPreconditioner
from kfac_sua.runs.metrics import read_records
from kfac_sua.training import diagnostics as diagnostics_module
from kfac_sua.training.build import build_training
from kfac_sua.training.diagnostics import Diagnostics
from kfac_sua.training.loop import run, train_epoch
from kfac_sua.training.progress import Progress
from kfac_sua.training.state import Training

CPU = torch.device("cpu")
CLIPPED = ("preconditioner=kfac", TINY_PERIOD, "preconditioner.application=weight", "preconditioner.kl_clip=1e-3")


def flat_gradient(model: nn.Module) -> torch.Tensor:
    """Return the gradient of all parameters as one vector in float64."""
    return torch.cat([parameter.grad.flatten().double() for parameter in model.parameters()])


def trained(tmp_path, *overrides: str) -> Training:
    """Train one epoch."""
    training = build_training(tiny_config(tmp_path, *overrides), CPU)
    progress = Progress(training.config.progress, "", total_steps=4, done_steps=0, epochs=1)
    train_epoch(training, progress)
    progress.close()
    return training


@pytest.mark.parametrize("overrides", [CLIPPED, ("preconditioner=sua_grouped", TINY_PERIOD)], ids=["clipped", "auto"])
def test_means_are_those_of_the_refreshes(tmp_path, monkeypatch, overrides):
    """Steps 1 and 4 of an epoch of four refresh: the gradient before, and what the optimizer gets."""
    pairs, scales, step = [], [], KroneckerPreconditioner.step

    def comparing(preconditioner, **options):
        is_refresh, plain = preconditioner.inverses_due, flat_gradient(preconditioner.model)
        step(preconditioner, **options)
        if is_refresh:
            pairs.append((plain, flat_gradient(preconditioner.model)))
            scales.append(float("nan") if preconditioner.kl_scale is None else preconditioner.kl_scale.item())

    monkeypatch.setattr(KroneckerPreconditioner, "step", comparing)
    means = trained(tmp_path, *overrides).diagnostics.means()
    assert len(pairs) == 2
    expected = {
        "gradient_norm": sum(g.norm().item() for g, _ in pairs) / 2,
        "update_norm": sum(u.norm().item() for _, u in pairs) / 2,
        "update_cosine": sum((g @ u / (g.norm() * u.norm())).item() for g, u in pairs) / 2,
        "kl_scale": sum(scales) / 2,
    }
    assert means == pytest.approx(expected, rel=1e-5, nan_ok=True)
    assert 0 < means["update_cosine"] < 0.99


OPTIMIZERS = {
    "sgd": ("optimizer.nesterov=true", "optimizer.weight_decay=0.1"),
    "adamw": ("optimizer=adamw", "optimizer.weight_decay=0.1"),
    "muon": ("optimizer=muon", "optimizer.weight_decay=0.1"),
}


@pytest.mark.parametrize(("optimizer", "capture"), diagonal(OPTIMIZERS, ["true", "false"]))
def test_the_baselines_gradient_is_its_update(tmp_path, monkeypatch, emulated, optimizer, capture):  # noqa: F811
    """No optimizer writes into it; it is looked at after the first and every so many steps, replayed ones too."""
    monkeypatch.setattr(diagnostics_module, "BASELINE_PERIOD", 4)
    norms, backward = [], torch.Tensor.backward

    def noting(loss, *arguments, **options):
        backward(loss, *arguments, **options)
        norms.append(flat_gradient(training.model).norm().item())

    small = ("batch_size=50", "preconditioner=baseline", *OPTIMIZERS[optimizer])  # eight steps
    training = build_training(tiny_config(tmp_path, *small, "capture=false"), CPU)
    monkeypatch.setattr(torch.Tensor, "backward", noting)
    progress = Progress(training.config.progress, "", total_steps=8, done_steps=0, epochs=1)
    train_epoch(training, progress)
    monkeypatch.setattr(torch.Tensor, "backward", backward)
    measured = trained(tmp_path, *small, f"capture={capture}")
    assert (len(norms), bool(emulated)) == (8, capture == "true")
    expected = {"gradient_norm": (norms[0] + norms[4]) / 2, "update_norm": (norms[0] + norms[4]) / 2}
    expected |= {"update_cosine": 1.0, "kl_scale": math.nan}
    assert measured.diagnostics.means() == pytest.approx(expected, rel=1e-5, nan_ok=True)
    assert math.isnan(measured.diagnostics.damping)


@pytest.mark.parametrize("overrides", [CLIPPED, ("preconditioner=sua", TINY_PERIOD), ("preconditioner=baseline",)])
def test_measuring_leaves_no_trace(tmp_path, monkeypatch, overrides):
    """State and losses are those of a training that does not measure, to the last bit."""
    states = []
    for is_measured in (True, False):
        if not is_measured:
            monkeypatch.setattr(Diagnostics, "around_preconditioning", lambda one: contextlib.nullcontext())
            monkeypatch.setattr(Diagnostics, "after_step", lambda one, batch: None)
        training = trained(tmp_path, *overrides)
        states.append(vars(training.checkpoint("f" * 64, "e" * 64)))
    looks = [state.pop("diagnostics")["num_looks"] for state in states]
    assert (looks[0] > 0, looks[1]) == (True, 0)
    assert_identical(*({name: value for name, value in state.items() if name != "times"} for state in states))


def test_an_epoch_without_a_refresh_has_no_norms(tmp_path):
    """The second of two epochs of four steps, at a refresh in six; the damping stands there all the same."""
    config = tiny_config(tmp_path, "preconditioner=sua", "preconditioner.inverse_period=6", "epochs=3")
    run(config)
    rows = read_records(directory_of(config).metrics)
    assert [math.isnan(row.gradient_norm) for row in rows] == [True, False, False, True]
    assert {row.current_damping for row in rows} == {config.preconditioner.damping}


def test_events_are_counted_in_two_kinds(tmp_path):
    """Faults of numbers, after which another inverse is at work, and all others."""
    training = build_training(tiny_config(tmp_path, "preconditioner=sua"), CPU)
    assert training.diagnostics.counts() == {"numerical_faults": 0, "other_events": 0}
    training.preconditioner.events.update(Counter({"failed_inverse:a": 2, "raised_damping:b": 1, "small_damping:a": 4}))
    assert training.diagnostics.counts() == {"numerical_faults": 3, "other_events": 4}
