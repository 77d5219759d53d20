"""When statistics and inverses are due, running averages, failures, and bit-exact continuation."""

import copy
import dataclasses
import io
import logging
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from kfac_sua.preconditioner import KroneckerPreconditioner, KroneckerSettings
from kfac_sua.preconditioner.refresh import refresh_layers

SETTINGS = [
    {"structure": "sua"},
    {"structure": "kfac", "group_size": 3, "damping_rule": "factored_pi"},
    {"structure": "kfac", "inverse_method": "low_rank"},
    {"structure": "sua", "damping_rule": "exact", "ema_decay": 0.8, "factor_period": 2},
    {"structure": "kfac", "fisher_type": "mc", "ema_decay": 0.5, "factor_period": 2},
    {"structure": "sua", "application": "auto", "weight_sharing": "reduce"},
]


def make_net() -> nn.Module:
    """Return a small float32 net."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 5, 3, bias=False), nn.ReLU(), nn.Conv2d(5, 6, 2), nn.Flatten(), nn.Linear(24, 3))


def batch(index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mini-batch ``index``."""
    generator = torch.Generator().manual_seed(index)
    return torch.randn(4, 2, 5, 5, generator=generator), torch.randint(0, 3, (4,), generator=generator)


def steps(net, preconditioner, optimizer, indices):
    """Train on the given mini-batches."""
    for index in indices:
        inputs, labels = batch(index)
        optimizer.zero_grad()
        outputs = net(inputs)
        preconditioner.fisher_backward(outputs)
        nn.functional.cross_entropy(outputs, labels).backward()
        preconditioner.step()
        optimizer.step()


def start(net, settings):
    """Return a preconditioner with refresh period 4 and an optimizer."""
    preconditioner = KroneckerPreconditioner(net, settings=KroneckerSettings(inverse_period=4, **settings))
    return preconditioner, torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("pause", [1, 3, 4, 6])
def test_continuation_is_bit_equal(settings, pause):
    """Taking k steps, save, load into new objects, m steps equals k + m steps, at any point of a refresh period."""
    whole = make_net()
    steps(whole, *start(whole, settings), range(9))

    first = make_net()
    preconditioner, optimizer = start(first, settings)
    steps(first, preconditioner, optimizer, range(pause))
    buffer = io.BytesIO()
    torch.save([first.state_dict(), optimizer.state_dict(), preconditioner.state_dict()], buffer)
    buffer.seek(0)
    states = torch.load(buffer, weights_only=True)

    second = make_net()
    preconditioner, optimizer = start(second, settings)
    for target, state in zip((second, optimizer, preconditioner), states, strict=True):
        target.load_state_dict(state)
    steps(second, preconditioner, optimizer, range(pause, 9))
    for got, want in zip(second.parameters(), whole.parameters(), strict=True):
        assert torch.equal(got, want)


def test_state_of_another_model_or_version_is_refused():
    """A state with other layers, or of another version, is named rather than half-loaded."""
    preconditioner = KroneckerPreconditioner(make_net())
    state = preconditioner.state_dict()
    other = KroneckerPreconditioner(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match=r"another model; layers that differ: 2, 4"):
        other.load_state_dict(state)
    with pytest.raises(ValueError, match=r"version 99, this release reads 5"):
        preconditioner.load_state_dict({**state, "version": 99})


def test_state_of_the_version_before_is_read():
    """A training that an earlier release has begun goes on bit for bit."""
    settings = {"structure": "kfac", "application": "auto"}
    net = make_net()
    preconditioner, optimizer = start(net, settings)
    steps(net, preconditioner, optimizer, range(6))
    state = copy.deepcopy(preconditioner.state_dict())
    state["version"] = 2
    del state["damping"], state["settings"]["kl_clip"], state["settings"]["products"]
    for layer in state["layers"].values():
        del layer["num_examples"], layer["factors"]
        layer["examples_per_process"] = None
    other = copy.deepcopy(net)
    continued, its_optimizer = start(other, settings)
    continued.load_state_dict(state)
    its_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for one in ((net, preconditioner, optimizer), (other, continued, its_optimizer)):
        steps(*one, range(6, 9))
    for parameter, same in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(parameter, same)
    assert continued.state_dict()["version"] == 5


def test_state_of_other_settings_is_refused():
    """A state is not reinterpreted under another rule or structure; the differing settings are named."""
    state = KroneckerPreconditioner(make_net(), damping=0.1).state_dict()
    other = KroneckerPreconditioner(make_net(), damping=0.2, structure="sua")
    with pytest.raises(ValueError, match=r"other settings: structure=kfac \(here sua\), damping=0.1 \(here 0.2\)"):
        other.load_state_dict(state)


def test_state_follows_the_models_precision():
    """A float32 state loaded into a float64 model is used in float64."""
    net = make_net()
    preconditioner, optimizer = start(net, {})
    steps(net, preconditioner, optimizer, range(2))
    double = make_net().double()
    other, _ = start(double, {})
    other.load_state_dict(preconditioner.state_dict())
    inputs, labels = batch(2)
    nn.functional.cross_entropy(double(inputs.double()), labels).backward()
    other.step()
    assert other._layers["0"].inverse.reference_tensor.dtype == torch.float64


def test_a_bias_frozen_later_is_left_alone():
    """Freezing a joint bias after construction does not break the weight's preconditioning."""
    net = make_net()
    preconditioner, optimizer = start(net, {})
    steps(net, preconditioner, optimizer, range(2))
    net[4].bias.requires_grad_(False)
    steps(net, preconditioner, optimizer, range(2, 6))
    assert net[4].bias.grad is None
    assert net[4].weight.grad.isfinite().all()


def test_periods():
    """Statistics and inverses are due on their own periods, counted from the first step."""
    net = make_net()
    preconditioner = KroneckerPreconditioner(net, inverse_period=6, factor_period=3, ema_decay=0.5)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    due = []
    for index in range(7):
        due.append((preconditioner.statistics_due, preconditioner.inverses_due))
        steps(net, preconditioner, optimizer, [index])
    assert [a for a, _ in due] == [True, False, False, True, False, False, True]
    assert [b for _, b in due] == [True, False, False, False, False, False, True]


def test_running_average_is_bias_corrected():
    """After k measurements the average is Σ (1−d) d^(k−i) Fᵢ / (1 − dᵏ), with no identity in it."""
    net = make_net().double()
    averaging = KroneckerPreconditioner(net, ema_decay=0.7, factor_period=1, inverse_period=1)
    single = KroneckerPreconditioner(net, inverse_period=1)
    measured = []
    for index in range(3):
        inputs, labels = batch(index)
        nn.functional.cross_entropy(net(inputs.double()), labels).backward()
        averaging.update_factors()
        single.update_factors()
        measured.append(single._layers["2"].average.corrected())
    weights = [0.3 * 0.7**2, 0.3 * 0.7, 0.3]
    average = averaging._layers["2"].average.corrected()
    for side in ("activation", "gradient"):
        parts = [getattr(factors, side).dense() for factors in measured]
        expected = sum(w * part for w, part in zip(weights, parts, strict=True)) / (1 - 0.7**3)
        torch.testing.assert_close(getattr(average, side).dense(), expected, rtol=1e-10, atol=1e-14)


def test_zero_decay_is_the_mini_batch_alone():
    """With ema_decay=0 the statistics of earlier mini-batches leave no trace."""
    net = make_net()
    preconditioner = KroneckerPreconditioner(net, inverse_period=1)
    for index in (7, 8):
        inputs, labels = batch(index)
        net.zero_grad()
        nn.functional.cross_entropy(net(inputs), labels).backward()
        preconditioner.step()
    fresh_net = make_net()
    fresh = KroneckerPreconditioner(fresh_net, inverse_period=1)
    inputs, labels = batch(8)
    nn.functional.cross_entropy(fresh_net(inputs), labels).backward()
    fresh.step()
    for got, want in zip(net.parameters(), fresh_net.parameters(), strict=True):
        assert torch.equal(got.grad, want.grad)


def test_step_without_statistics_says_what_is_missing():
    """step() before any backward pass, or without fisher_backward, names the missing call."""
    preconditioner = KroneckerPreconditioner(make_net())
    with pytest.raises(RuntimeError, match=r"no backward pass through the model was recorded"):
        preconditioner.step()
    net = make_net()
    sampled = KroneckerPreconditioner(net, fisher_type="mc")
    inputs, labels = batch(0)
    nn.functional.cross_entropy(net(inputs), labels).backward()
    with pytest.raises(RuntimeError, match=r"fisher_type=mc call fisher_backward\(outputs\) between"):
        sampled.step()


def test_unused_layers_are_named_once(caplog):
    """A layer that the loss does not reach is logged once and its parameters stay without gradient."""
    net = make_net()
    net.unused = nn.Linear(3, 3)
    net.forward = lambda x: net[4](net[3](net[2](net[1](net[0](x)))))
    preconditioner, optimizer = start(net, {})
    with caplog.at_level(logging.WARNING, logger="kfac_sua"):
        steps(net, preconditioner, optimizer, range(9))
    assert [record.getMessage().split(":")[0] for record in caplog.records] == ["unused"]
    assert preconditioner.events["not_reached:unused"] == 3
    assert net.unused.weight.grad is None


def test_a_mini_batch_with_nan_leaves_the_last_inverse(caplog):
    """Non-finite statistics never reach an inverse: the last good one stays, and the event is counted."""
    net = make_net()
    preconditioner, optimizer = start(net, {"ema_decay": 0.5})
    steps(net, preconditioner, optimizer, range(4))
    before = copy.deepcopy(preconditioner.state_dict()["layers"]["0"])
    inputs, labels = batch(4)
    inputs[0, 0, 0, 0] = float("nan")
    with caplog.at_level(logging.WARNING, logger="kfac_sua"):
        nn.functional.cross_entropy(net(inputs), labels).backward()
        preconditioner.step()
    after = preconditioner.state_dict()["layers"]["0"]
    for side in ("activation", "gradient"):
        assert torch.equal(after["average"][side]["blocks"], before["average"][side]["blocks"])
        assert torch.equal(after["inverse"][side]["blocks"], before["inverse"][side]["blocks"])
    assert preconditioner.events["non_finite_statistics:0"] == 1
    assert "0: non finite statistics" in caplog.text


@pytest.mark.parametrize("method", ["cholesky", "low_rank"])
def test_a_failed_first_inverse_names_layer_and_cure(method):
    """A damping lost in rounding on a rank-deficient factor is an error that says to raise it."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(30, 2, bias=False))
    preconditioner = KroneckerPreconditioner(net, damping=1e-30, inverse_method=method)
    inputs = torch.randn(3, 30) * 1e3
    nn.functional.cross_entropy(net(inputs), torch.tensor([0, 1, 1])).backward()
    with pytest.raises(RuntimeError, match=r"layer '0' cannot be inverted .* damping 1e-30; raise the damping"):
        preconditioner.step()


def test_a_first_inverse_that_fails_leaves_those_of_layers_before_it(monkeypatch):
    """They are taken; with more damping the failed one can be made, and then all have one."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(30, 4), nn.Tanh(), nn.Linear(4, 2, bias=False))
    preconditioner = KroneckerPreconditioner(net, damping=0.1)
    nn.functional.cross_entropy(net(torch.randn(5, 30)), torch.tensor([0, 1, 1, 0, 1])).backward()
    preconditioner.update_factors()

    def second_fails(*args, **kwargs):
        first, second = refresh_layers(*args, **kwargs)
        return [first, dataclasses.replace(second, num_failed=1)]

    with monkeypatch.context() as patch:
        patch.setattr("kfac_sua.preconditioner.structures.kronecker.refresh_layers", second_fails)
        with pytest.raises(RuntimeError, match=r"layer '2' cannot be inverted"):
            preconditioner.update_inverses()
    assert [layer.inverse is not None for layer in preconditioner.layers] == [True, False]
    preconditioner.update_inverses()
    assert [layer.inverse is not None for layer in preconditioner.layers] == [True, True]


def test_a_checkpoint_in_bfloat16_is_read_as_float32():
    """Only what is kept in bfloat16 parts stays so."""
    net = make_net()
    preconditioner, optimizer = start(net, {})
    steps(net, preconditioner, optimizer, range(2))
    halved = copy.deepcopy(preconditioner.state_dict())
    for layer in halved["layers"].values():
        for side in ("activation", "gradient"):
            entry = layer["inverse"][side]
            layer["inverse"][side] = {name: tensor.bfloat16() for name, tensor in entry.items()}
    preconditioner.load_state_dict(halved)
    dtypes = {tensor.dtype for layer in preconditioner.layers for tensor in layer.inverse.tensors()}
    assert dtypes == {torch.float32}


def test_a_failed_later_inverse_keeps_the_last_good_one(monkeypatch, caplog):
    """When a refresh fails, the layer goes on with its last inverse; the event is counted and logged once."""
    net = make_net()
    preconditioner, optimizer = start(net, {})
    steps(net, preconditioner, optimizer, range(4))
    good = preconditioner._layers["0"].inverse
    monkeypatch.setattr("torch.linalg.cholesky_ex", lambda cores: (cores, torch.ones(len(cores), dtype=torch.int32)))
    with caplog.at_level(logging.WARNING, logger="kfac_sua"):
        steps(net, preconditioner, optimizer, range(4, 9))
    assert preconditioner._layers["0"].inverse is good
    assert preconditioner.events["failed_inverse:0"] == 2
    assert caplog.text.count("0: failed inverse; its last good inverse stays") == 1


def test_dead_layers_stay_finite():
    """A layer whose inputs and gradients are all zero has a finite inverse under every rule."""
    for rule in ("factored", "factored_pi", "exact"):
        net = make_net()
        nn.init.constant_(net[0].weight, 0.0)
        nn.init.constant_(net[2].weight, 0.0)
        preconditioner = KroneckerPreconditioner(net, damping_rule=rule)
        inputs, labels = batch(0)
        nn.functional.cross_entropy(net(inputs), labels).backward()
        preconditioner.step()
        assert all(parameter.grad.isfinite().all() for parameter in net.parameters())


def test_phases_tell_where_time_goes():
    """Statistics, inversion and application run inside the contexts that ``phase`` gives for these names."""
    seen = []

    @contextmanager
    def phase(name):
        seen.append(name)
        yield

    net = make_net()
    preconditioner, optimizer = start(net, {})
    preconditioner.phase = phase
    steps(net, preconditioner, optimizer, range(2))
    assert seen.count("inversion") == 1
    assert seen.count("application") == 2
    assert seen.count("statistics") == 2 * 3 + 1  # inputs and output gradients of three layers, and the normalisation
