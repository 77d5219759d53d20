"""KL clip: the scale, what it covers, and the inputs on which such code breaks."""

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from kfac_sua.preconditioner import KroneckerPreconditioner, KroneckerSettings
from kfac_sua.preconditioner.kl_clip import clip_scale

LR = 0.3
SETTINGS = [
    {"structure": "kfac"},
    {"structure": "sua", "group_size": 3},
    {"structure": "kfac", "inverse_method": "low_rank"},
    {"structure": "sua", "damping_rule": "exact"},
    {"structure": "kfac", "fisher_type": "mc", "damping_rule": "factored_pi"},
]


def make_net() -> nn.Module:
    """Return a float64 net whose batch normalisation keeps the plain gradient."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 2, bias=False), nn.Flatten(), nn.Linear(12, 3)
    ).double()


def backward(net: nn.Module, preconditioner: KroneckerPreconditioner) -> None:
    """Send one mini-batch through the net and back."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(6, 2, 5, 5, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 3, (6,), generator=generator)
    net.zero_grad()
    outputs = net(inputs)
    preconditioner.fisher_backward(outputs)
    nn.functional.cross_entropy(outputs, labels).backward()


def gradients(net: nn.Module) -> dict[str, Tensor]:
    """Return copies of all gradients."""
    return {name: parameter.grad.clone() for name, parameter in net.named_parameters()}


def is_preconditioned(name: str) -> bool:
    """Whether a parameter of the net is that of a preconditioned layer."""
    return not name.startswith("1.")


def unclipped(settings: dict) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the plain and the preconditioned gradients without clipping."""
    net = make_net()
    preconditioner = KroneckerPreconditioner(net, damping=0.05, **settings)
    backward(net, preconditioner)
    plain = gradients(net)
    preconditioner.step()
    return plain, gradients(net)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("lr", [LR, torch.tensor(LR, dtype=torch.float64)])
def test_clipped_gradients_equal_the_hand_computation(settings, lr):
    """All preconditioned gradients, biases too, are multiplied by √(κ / (lr² Σ g·u)); batch normalisation is not."""
    plain, full = unclipped(settings)
    total = sum(float((plain[name] * full[name]).sum()) for name in plain if is_preconditioned(name))
    kappa = 0.37 * LR**2 * total
    net = make_net()
    preconditioner = KroneckerPreconditioner(net, damping=0.05, kl_clip=kappa, **settings)
    backward(net, preconditioner)
    assert preconditioner.step(lr=lr)
    for name, got in gradients(net).items():
        want = full[name] * math.sqrt(0.37) if is_preconditioned(name) else plain[name]
        torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    assert float(preconditioner.kl_scale) == pytest.approx(math.sqrt(0.37), rel=1e-12)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("lr", [0.0, LR])
def test_a_short_step_is_left_alone_to_the_last_bit(settings, lr):
    """It is never enlarged, also not at a learning rate of zero."""
    _, full = unclipped(settings)
    net = make_net()
    preconditioner = KroneckerPreconditioner(net, damping=0.05, kl_clip=1e6, **settings)
    backward(net, preconditioner)
    preconditioner.step(lr=lr)
    for name, got in gradients(net).items():
        assert torch.equal(got, full[name])


@pytest.mark.parametrize("total", [0.0, -1e-9, -5.0, 1e-30, 1e-3, 1.0, 1e12, math.inf, math.nan])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scale_is_in_the_unit_interval_and_bounds_the_step(total, dtype):
    """For every sum, and after scaling lr² Σ g·u is at most κ."""
    for kappa, lr in itertools.product([1e-12, 1e-6, 1e-3, 1.0, 1e3], [0.0, 1e-4, 1.0, 1e3]):
        scale = float(clip_scale(torch.tensor([total / 2, total / 2], dtype=dtype), lr, kappa))
        assert 0 <= scale <= 1
        squared_norm = total * lr**2
        if math.isclose(squared_norm, kappa, rel_tol=1e-5):
            assert scale >= 1 - 1e-5  # which side of κ it is on is a matter of the precision's rounding
        elif not squared_norm > kappa:
            assert scale == 1  # zero, negative and NaN among them
        elif math.isinf(total):
            assert scale == 0
        else:
            assert scale**2 * squared_norm <= kappa * (1 + 1e-5)


def test_a_zero_gradient_stays_zero():
    """Nothing is divided by it."""
    net = make_net()
    preconditioner = KroneckerPreconditioner(net, kl_clip=1e-3)
    backward(net, preconditioner)
    for parameter in net.parameters():
        parameter.grad.zero_()
    preconditioner.step(lr=LR)
    assert float(preconditioner.kl_scale) == 1
    assert all(not parameter.grad.any() for parameter in net.parameters())


def test_a_nan_is_neither_hidden_nor_spread():
    """The gradient that has it keeps it, and those of other layers are as without clipping."""
    _, full = unclipped({})
    net = make_net()
    preconditioner = KroneckerPreconditioner(net, damping=0.05, kl_clip=1e-12)
    backward(net, preconditioner)
    net[3].weight.grad[0, 0, 0, 0] = math.nan
    preconditioner.step(lr=LR)
    for name, got in gradients(net).items():
        if name == "3.weight":
            assert got.isnan().any()
        else:
            assert torch.equal(got, full[name])


def test_layers_before_their_first_refresh_are_not_covered():
    """A layer that keeps the plain gradient neither counts nor is scaled."""
    net = make_net()
    preconditioner = KroneckerPreconditioner(net, damping=0.05, kl_clip=1e-12)
    preconditioner.precondition_(lr=LR)
    assert preconditioner.kl_scale is None
    backward(net, preconditioner)
    plain = gradients(net)
    preconditioner._layers["3"].statistics.clear()
    preconditioner.step(lr=LR)
    assert torch.equal(net[3].weight.grad, plain["3.weight"])
    assert not torch.allclose(net[0].weight.grad, plain["0.weight"])


def test_low_precision_gradients_are_multiplied_in_float32():
    """The sum over a bfloat16 model is that of float32, and the gradients stay bfloat16."""
    net = make_net().bfloat16()
    preconditioner = KroneckerPreconditioner(net, damping=0.05, kl_clip=1e-6)
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(6, 2, 5, 5, generator=generator).bfloat16()
    nn.functional.cross_entropy(net(inputs), torch.zeros(6, dtype=torch.long)).backward()
    preconditioner.step(lr=LR)
    assert preconditioner.kl_scale.dtype == torch.float32
    assert 0 < float(preconditioner.kl_scale) < 1
    assert net[0].weight.grad.dtype == torch.bfloat16


def test_the_learning_rate_must_be_given():
    """A missing or impossible one is refused before anything changes."""
    net = make_net()
    preconditioner = KroneckerPreconditioner(net, kl_clip=1e-3)
    backward(net, preconditioner)
    plain = gradients(net)
    with pytest.raises(ValueError, match=r"^kl_clip=0.001 needs the learning rate of every step: call step\(lr="):
        preconditioner.step()
    for lr in (-0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match="lr must be the learning rate of the step, a finite number >= 0, got"):
            preconditioner.step(lr=lr)
    assert all(torch.equal(got, plain[name]) for name, got in gradients(net).items())
    assert preconditioner.num_steps == 0
    assert preconditioner.step(lr=LR)


@pytest.mark.parametrize("value", [0, -1e-3, math.nan, math.inf])
def test_a_clip_out_of_range_is_refused(value):
    """κ is a number > 0."""
    with pytest.raises(ValueError, match=r"^kl_clip must be > 0 within the range of float32, or null \(no clipping\)"):
        KroneckerSettings(kl_clip=value)


@pytest.mark.parametrize("value", ["0.1", True])
def test_a_clip_of_another_type_is_refused(value):
    """Text and truth values are no numbers."""
    with pytest.raises(ValueError, match=r"^kl_clip must be a number, got"):
        KroneckerSettings(kl_clip=value)


def test_application_in_the_backward_pass_contradicts_it():
    """There the plain gradient never exists."""
    with pytest.raises(ValueError, match=r"^kl_clip=0.001 needs the plain gradient .*; use application=weight or"):
        KroneckerSettings(kl_clip=1e-3, application="auto")
