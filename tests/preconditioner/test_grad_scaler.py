"""A loss scaled by a GradScaler: the statistics do not see the scale, and what the scaler skips leaves no trace."""

import copy

import pytest
import torch
from thinned import diagonal
from torch import nn

from kfac_sua.preconditioner import KroneckerPreconditioner, KroneckerSettings

SETTINGS = [
    {"structure": "kfac"},
    {"structure": "kfac", "inverse_method": "low_rank"},
    {"structure": "sua", "group_size": 3, "ema_decay": 0.8},
    {"structure": "sua", "weight_sharing": "reduce", "damping_rule": "factored_pi"},
    {"structure": "sua", "damping_rule": "exact"},
    {"structure": "kfac", "loss_reduction": "sum"},
    {"structure": "kfac", "fisher_type": "mc"},
    {"structure": "sua", "application": "auto"},
]


def make_net() -> nn.Module:
    """Return a small float32 net with parameters that are not preconditioned."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 12, 3, bias=False),
        nn.GroupNorm(2, 12),
        nn.ReLU(),
        nn.Conv2d(12, 20, 3, bias=False),
        nn.Flatten(),
        nn.Linear(20, 3),
    )


def batch(index: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mini-batch ``index``."""
    generator = torch.Generator().manual_seed(index)
    inputs = torch.randn(4, 2, 5, 5, generator=generator)
    return inputs.to(dtype), torch.randint(0, 3, (4,), generator=generator)


def start(net, settings) -> KroneckerPreconditioner:
    """Return a preconditioner that refreshes at every third mini-batch."""
    return KroneckerPreconditioner(net, settings=KroneckerSettings(inverse_period=3, **settings))


@pytest.mark.parametrize(("settings", "loss_scale"), diagonal(SETTINGS, [1024.0, 0.3]), ids=str)
def test_a_scaled_loss_gives_the_unscaled_factors_and_gradients(settings, loss_scale):
    """Five float64 steps over two refreshes agree, also for a scale that is no power of two."""
    results = []
    for scale in (1.0, loss_scale):
        net = make_net().double()
        preconditioner = start(net, settings)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
        for index in range(5):
            inputs, labels = batch(index, torch.float64)
            optimizer.zero_grad()
            outputs = net(inputs)
            preconditioner.fisher_backward(outputs)
            (nn.functional.cross_entropy(outputs, labels) * scale).backward()
            for parameter in net.parameters():
                parameter.grad /= scale
            assert preconditioner.step(loss_scale=scale) is True
            optimizer.step()
        net.zero_grad()
        inputs, labels = batch(5, torch.float64)
        with preconditioner.capture():
            outputs = net(inputs)
            preconditioner.fisher_backward(outputs)
            (nn.functional.cross_entropy(outputs, labels) * scale).backward()
        preconditioner.update_factors(loss_scale=scale)
        factors = [layer.average.corrected() for layer in preconditioner._layers.values()]
        sides = [factor.dense() for layer in factors for factor in (layer.activation, layer.gradient)]
        results.append([*net.parameters(), *sides])
    for scaled, plain in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(scaled, plain, rtol=1e-9, atol=1e-14)


def train(settings, dtype, overflowing, *, leaves_out):
    """Train for eight mini-batches under a GradScaler, one of them overflowing; return what there is afterwards.

    Args:
        settings: Settings of the preconditioner.
        dtype: Type of autocast; float32 for none.
        overflowing: Index of the mini-batch whose scaled gradients are infinite.
        leaves_out: Leave that mini-batch out, and only set the loss scale that it leads to.
    """
    net = make_net()
    preconditioner = start(net, settings)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=1000)
    scaler.scale(torch.zeros(()))  # it makes its state at first use, which update() needs
    taken = []
    for index in range(8):
        if index == overflowing and leaves_out:
            scaler.update(128.0)
            continue
        inputs, labels = batch(index)
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not torch.float32):
            outputs = net(inputs)
            preconditioner.fisher_backward(outputs)
            loss = nn.functional.cross_entropy(outputs, labels)
        scaler.scale(loss * (1e38 if index == overflowing else 1)).backward()
        scaler.unscale_(optimizer)
        taken.append(preconditioner.step(loss_scale=scaler.get_scale()))
        scaler.step(optimizer)
        scaler.update()
    assert taken == [leaves_out or index != overflowing for index in range(len(taken))]
    return net, preconditioner, scaler


@pytest.mark.parametrize(
    ("settings", "dtype", "overflowing"),
    diagonal(SETTINGS, [torch.float32, torch.bfloat16, torch.float16], [0, 2, 3]),
    ids=str,
)
def test_a_mini_batch_that_overflows_leaves_no_trace(settings, dtype, overflowing):
    """On a refresh, before any, or between two: training is bit for bit that without the mini-batch."""
    net, preconditioner, scaler = train(settings, dtype, overflowing, leaves_out=False)
    without, reference, reference_scaler = train(settings, dtype, overflowing, leaves_out=True)
    assert scaler.get_scale() == reference_scaler.get_scale() == 128.0
    assert preconditioner.num_steps == reference.num_steps == 7
    assert preconditioner.events == reference.events == {}
    for got, want in zip(net.parameters(), without.parameters(), strict=True):
        assert got.isfinite().all()
        assert torch.equal(got, want)


@pytest.mark.parametrize("name", ["0.weight", "1.weight", "5.bias"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_one_gradient_that_is_not_finite_skips_the_step(name, value):
    """Of any parameter, also one that is not preconditioned: the scaler skips the optimizer's step for it too."""
    net = make_net()
    preconditioner = start(net, {})
    inputs, labels = batch(0)
    nn.functional.cross_entropy(net(inputs), labels).backward()
    net.get_parameter(name).grad.flatten()[0] = value
    before = copy.deepcopy([parameter.grad for parameter in net.parameters()])
    assert preconditioner.step(loss_scale=2.0) is False
    assert preconditioner.num_steps == 0
    assert all(layer.inverse is None for layer in preconditioner._layers.values())
    for parameter, grad in zip(net.parameters(), before, strict=True):
        torch.testing.assert_close(parameter.grad, grad, rtol=0, atol=0, equal_nan=True)
    with pytest.raises(RuntimeError, match="no backward pass through the model was recorded"):
        preconditioner.step()


def test_a_skipped_gradient_may_have_carried_other_sides():
    """The next mini-batch is not mixed with a large one, preconditioned otherwise in its backward pass."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(4, 40, 3, bias=False), nn.Flatten(), nn.Linear(360, 3)).double()
    preconditioner = KroneckerPreconditioner(net, structure="sua", application="auto", inverse_period=10)
    taken = []
    for size, overflow in ((2, 1.0), (400, float("inf")), (2, 1.0)):
        net.zero_grad()
        (net(torch.randn(size, 4, 5, 5, dtype=torch.float64)).square().sum(1).mean() * overflow).backward()
        taken.append(preconditioner.step(loss_scale=2.0))
    assert taken == [True, False, True]


def test_gradients_that_are_large_but_finite_are_taken():
    """The squares of such gradients overflow; the step is taken all the same."""
    net = make_net()
    preconditioner = start(net, {})
    inputs, labels = batch(0)
    nn.functional.cross_entropy(net(inputs), labels).backward()
    net[1].weight.grad.fill_(1e30)
    assert preconditioner.step(loss_scale=2.0) is True


def test_without_a_scale_gradients_are_not_looked_at(monkeypatch):
    """An ordinary step does not wait for the device; with a scale, it does once."""
    looks = []
    original = nn.utils.get_total_norm
    monkeypatch.setattr(
        nn.utils, "get_total_norm", lambda *args, **kwargs: looks.append(1) or original(*args, **kwargs)
    )
    net = make_net()
    preconditioner = start(net, {})
    for loss_scale, expected in ((None, 0), (4.0, 1), (1.0, 2)):
        inputs, labels = batch(0)
        (nn.functional.cross_entropy(net(inputs), labels) * (loss_scale or 1)).backward()
        assert preconditioner.step(loss_scale=loss_scale) is True
        assert len(looks) == expected


@pytest.mark.parametrize("loss_scale", [0.0, -2.0, float("nan"), float("inf")])
def test_a_scale_that_cannot_be_is_refused(loss_scale):
    """The message names the argument, the value and where to take it from."""
    preconditioner = start(make_net(), {})
    message = rf"loss_scale must be the finite number > 0 .*, got {loss_scale}; pass scaler\.get_scale\(\)"
    with pytest.raises(ValueError, match=message):
        preconditioner.step(loss_scale=loss_scale)
    with pytest.raises(ValueError, match=message):
        preconditioner.update_factors(loss_scale=loss_scale)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("fisher_type", ["empirical", "mc"])
def test_training_in_float16_on_a_cuda_device(fisher_type):
    """From a scale that overflows at first, float16 training goes on as soon as the scaler has lowered it."""
    net = make_net().cuda()
    preconditioner = start(net, {"fisher_type": fisher_type})
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**40)
    taken = []
    for index in range(60):
        inputs, labels = (tensor.cuda() for tensor in batch(index % 4))
        optimizer.zero_grad()
        with torch.autocast("cuda", dtype=torch.float16):
            outputs = net(inputs)
            preconditioner.fisher_backward(outputs)
            loss = nn.functional.cross_entropy(outputs, labels)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        taken.append(preconditioner.step(loss_scale=scaler.get_scale()))
        scaler.step(optimizer)
        scaler.update()
    assert not taken[0]
    assert taken[-1]
    assert preconditioner.num_steps == sum(taken)
    assert preconditioner.events == {}
    assert all(parameter.isfinite().all() for parameter in net.parameters())
