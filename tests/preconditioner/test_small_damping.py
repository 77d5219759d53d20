"""Dampings that float32 does not resolve beside the eigenvalues of a block: right to 1 %, or named."""

import copy

import pytest
import torch
from thinned import diagonal
from torch import nn

from kfac_sua.preconditioner import KroneckerPreconditioner

STRUCTURES = [
    {"structure": "kfac"},
    {"structure": "sua"},
    {"structure": "kfac", "group_size": 5},
    {"structure": "kfac", "ema_decay": 0.9},
    {"structure": "sua", "inverse_method": "cholesky"},
]
RULES = ["factored", "factored_pi", "exact"]


def make_net() -> nn.Module:
    """Return a net with a bias in one layer and few locations in the last."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * 36, 10)).double()


def preconditioned(net, inputs, **options):
    """Return the preconditioned weight gradients by layer, in float64, and the events."""
    preconditioner = KroneckerPreconditioner(net, **options)
    labels = torch.arange(len(inputs)) % 10
    nn.functional.cross_entropy(net(inputs), labels).backward()
    preconditioner.step()
    grads = {layer.name: layer.weight.grad.double() for layer in preconditioner.layers}
    return grads, preconditioner.events


@pytest.mark.parametrize(("settings", "rule", "gain"), diagonal(STRUCTURES, RULES, [1.0, 30.0]), ids=str)
def test_a_gradient_is_right_to_one_percent_or_its_layer_is_named(rule, settings, gain):
    """From ε = 0.1 to 1e-12 in float32 against float64, with small and large eigenvalues."""
    net = make_net()
    inputs = gain * torch.randn(32, 3, 6, 6, dtype=torch.float64)
    num_named, errors = 0, []
    for exponent in (1, 2, 4, 6, 8, 12):
        options = {"damping": 10.0**-exponent, "damping_rule": rule, **settings}
        exact, _ = preconditioned(copy.deepcopy(net), inputs, **options)
        single, events = preconditioned(copy.deepcopy(net).float(), inputs.float(), **options)
        for name, want in exact.items():
            error = ((single[name] - want).norm() / want.norm()).item()
            is_named = f"small_damping:{name}" in events or f"raised_damping:{name}" in events
            assert error < 0.01 or is_named, (name, exponent, error)
            num_named += is_named
            errors.append(error)
            if exponent <= 2 and gain == 1.0:
                assert not is_named  # the dampings that people use
    assert num_named
    assert max(errors) > 0.01 or "group_size" in settings  # small blocks have no small eigenvalues here


@pytest.mark.parametrize("rule", RULES)
def test_float64_needs_no_warning(rule):
    """It resolves what float32 does not."""
    net = make_net()
    _, events = preconditioned(net, torch.randn(32, 3, 6, 6, dtype=torch.float64), damping=1e-9, damping_rule=rule)
    assert not events


def test_exact_damping_is_decomposed_in_float64_where_its_share_is_small(monkeypatch, caplog):
    """Large dampings stay in float32, which is faster; small ones have a twentieth of its error, and a warning."""
    net = make_net()
    inputs = torch.randn(32, 3, 6, 6, dtype=torch.float64)
    dtypes = []
    original = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda blocks: dtypes.append(blocks.dtype) or original(blocks))
    preconditioned(copy.deepcopy(net).float(), inputs.float(), damping=1.0, damping_rule="exact")
    assert set(dtypes) == {torch.float32}
    preconditioned(copy.deepcopy(net).float(), inputs.float(), damping=1e-6, damping_rule="exact")
    assert torch.float64 in dtypes
    assert "5: small damping; damping 1e-06 is so small beside the trace of its Fisher block" in caplog.text
