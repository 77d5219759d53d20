"""Odd models: weights used without a call, batches that are not first, hooks of others; named, or seen past."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

from kfac_sua.preconditioner import KroneckerPreconditioner
from kfac_sua.preconditioner.model.discovery import discover_layers

DTYPE = torch.float64


class Functional(nn.Module):
    """Uses the weight of one of its layers without calling the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        """Return logits."""
        return F.linear(self.body(x).tanh(), self.head.weight, self.head.bias)


def test_a_weight_used_without_calling_its_layer_is_named(caplog):
    """The layer keeps the plain gradient, bit for bit, and the event tells it from one that was not reached."""
    torch.manual_seed(0)
    net = Functional()
    inputs = torch.randn(6, 4)
    loss = net(inputs).square().sum(1).mean()
    plain = torch.autograd.grad(loss, [net.head.weight, net.head.bias])
    preconditioner = KroneckerPreconditioner(net)
    net(inputs).square().sum(1).mean().backward()
    preconditioner.step()
    assert preconditioner.events == {"call_not_seen:head": 1}
    assert (
        "head: call not seen; it got a gradient that no recorded call brought, as when its weight is used"
        in caplog.text
    )
    assert torch.equal(net.head.weight.grad, plain[0])
    assert torch.equal(net.head.bias.grad, plain[1])


class Branches(nn.Module):
    """Takes one of two branches."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(4, 5)
        self.right = nn.Linear(4, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x, left: bool):
        """Return logits by way of one branch."""
        return self.head((self.left if left else self.right)(x).tanh())


@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_branch_not_taken_keeps_its_last_inverse_or_the_plain_gradient(caplog, set_to_none):
    """Before its first measurement, a branch that is taken has the plain gradient; later its last inverse."""
    torch.manual_seed(0)
    net = Branches().to(DTYPE)
    preconditioner = KroneckerPreconditioner(net, inverse_period=2)
    for left in (True, False, False, True):  # statistics are due at the first and the third
        branch = net.left if left else net.right
        net.zero_grad(set_to_none=set_to_none)
        inputs = torch.randn(6, 4, dtype=DTYPE)
        with preconditioner.paused():
            (plain,) = torch.autograd.grad(net(inputs, left).square().sum(1).mean(), [branch.weight])
        net(inputs, left).square().sum(1).mean().backward()
        has_inverse = preconditioner._layers["left" if left else "right"].inverse is not None
        will_have = has_inverse or preconditioner.statistics_due
        preconditioner.step()
        assert torch.equal(branch.weight.grad, plain) == (not will_have)
    assert preconditioner.events == {"not_reached:right": 1, "not_reached:left": 1}
    assert "right: not reached; it goes on with the plain gradient, until" in caplog.text
    assert "left: not reached; it goes on with its last inverse, until" in caplog.text


class SequenceFirst(nn.Module):
    """Works on ``[sequence, batch, features]``, as nn.Transformer does by default, and pools for its head."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 5)
        self.second = nn.Linear(5, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        """Return logits."""
        return self.head(self.second(self.first(x).tanh()).tanh().mean(0))


def test_another_number_of_examples_in_some_layer_is_named(caplog):
    """Where the batch is not the first dimension everywhere, scales differ: the odd layer is named, once."""
    net = SequenceFirst()
    preconditioner = KroneckerPreconditioner(net, inverse_period=1)
    for _ in range(2):
        net.zero_grad()
        net(torch.randn(7, 6, 4)).square().sum(1).mean().backward()
        preconditioner.step()
    assert preconditioner.events == {"other_examples:head": 2}
    assert "the first dimension of its inputs, 6, counts as examples, but the inputs of the model have 7" in caplog.text
    assert len(caplog.records) == 1


@pytest.mark.parametrize("prepended", [False, True])
def test_hooks_of_others_that_change_inputs_and_outputs_are_seen_past(prepended):
    """The statistics are those of the layer itself: of the inputs it got, and of the output it gave."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).to(DTYPE)
    hooked = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).to(DTYPE)
    hooked.load_state_dict(net.state_dict())
    hooked[0].register_forward_pre_hook(lambda module, args: (args[0] * 3,))
    hooked[0].register_forward_hook(lambda module, args, output: output * 2, prepend=prepended)
    inputs = torch.randn(6, 4, dtype=DTYPE)
    grads = []
    for model, forward in ((net, lambda x: net[2](torch.tanh(net[0](x * 3) * 2))), (hooked, hooked)):
        preconditioner = KroneckerPreconditioner(model)
        forward(inputs).square().sum(1).mean().backward()
        preconditioner.step()
        grads.append([parameter.grad for parameter in model.parameters()])
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


class Standardised(nn.Conv2d):
    """A convolution that computes with another weight, by the method that nn.Conv2d.forward calls."""

    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input, weight - weight.mean(), bias)


class Subclass(torch.Tensor):
    """A kind of tensor that products are not known for, as a sharded one."""


class WithToken(nn.Module):
    """Holds a parameter beside its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(3))
        self.layer = nn.Linear(3, 3)


def test_layers_that_cannot_be_treated_are_named_exactly_once():
    """Other weights than the layer's own, parametrised biases, other kinds of tensors, parameters beside layers."""
    model = nn.ModuleDict(
        {
            "standardised": Standardised(3, 3, 3),
            "spectral": nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3)),
            "old_spectral": nn.utils.spectral_norm(nn.Conv2d(3, 3, 3)),
            "weight_norm": nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 3, 3)),
            "pruned": prune.random_unstructured(nn.Linear(3, 3), "weight", 0.5),
            "bias": nn.utils.parametrize.register_parametrization(nn.Linear(3, 3), "bias", nn.Tanh()),
            "sharded": nn.Linear(3, 3),
            "with_token": WithToken(),
            "list": nn.ParameterList([nn.Parameter(torch.zeros(2))]),
        }
    )
    model["sharded"].weight = nn.Parameter(torch.zeros(3, 3).as_subclass(Subclass))
    assert {layer.name: layer.reason for layer in discover_layers(model)} == {
        "standardised": "Standardised overrides _conv_forward",
        "spectral": "its weight is computed (parametrised), not a parameter",
        "old_spectral": "its weight is computed (parametrised), not a parameter",
        "weight_norm": "its weight is computed (parametrised), not a parameter",
        "pruned": "its weight is computed (parametrised), not a parameter",
        "bias": "its bias is computed (parametrised), not a parameter",
        "sharded": "its weight is a Subclass, not an ordinary tensor",
        "with_token": "token of WithToken itself",
        "with_token.layer": "",
        "list": "ParameterList is not supported (nn.Linear and nn.Conv2d are)",
    }
