"""Preconditioning inside the backward pass gives what preconditioning the weight gradient gives."""

import copy

import pytest
import torch
from torch import nn

from kfac_sua.preconditioner import KroneckerPreconditioner, KroneckerSettings


def make_net(kind: str) -> nn.Module:
    """Return a float64 net whose convolutions have few rows and wide weights."""
    torch.manual_seed(0)
    layers = {
        "plain": [nn.Conv2d(6, 20, 3, padding=1, bias=False), nn.ReLU(inplace=True), nn.Conv2d(20, 22, 3, bias=False)],
        "strided": [nn.Conv2d(6, 20, 3, stride=2, padding=2, dilation=2, bias=False), nn.Conv2d(20, 18, 1, bias=False)],
        "groups": [nn.Conv2d(6, 20, 3, padding=1, groups=2, bias=False), nn.Conv2d(20, 20, 3, groups=4, bias=False)],
    }[kind]
    return nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(3)).double()


SETTINGS = [
    {"structure": "sua"},
    {"structure": "sua", "group_size": 8},
    {"structure": "kfac"},
    {"structure": "kfac", "group_size": 8, "damping_rule": "factored_pi"},
    {"structure": "kfac", "inverse_method": "low_rank"},
]


def train(net, inputs, labels, *, application, settings, steps=5, micro_batches=1, weight_decay=0.0):
    """Train a copy of a net and return its parameters and the preconditioner."""
    net = copy.deepcopy(net)
    preconditioner = KroneckerPreconditioner(
        net, settings=KroneckerSettings(application=application, inverse_period=3, damping=0.1, **settings)
    )
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=weight_decay)
    for _ in range(steps):
        optimizer.zero_grad()
        for part, part_labels in zip(inputs.chunk(micro_batches), labels.chunk(micro_batches), strict=True):
            (nn.functional.cross_entropy(net(part), part_labels) / micro_batches).backward()
        preconditioner.step()
        optimizer.step()
    return [parameter.detach() for parameter in net.parameters()], preconditioner


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("kind", ["plain", "strided", "groups"])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_training_is_the_same_on_the_sides_and_on_the_weight(kind, settings, micro_batches):
    """Five steps over two refreshes agree in float64, with momentum, weight decay and gradient accumulation."""
    net = make_net(kind)
    inputs, labels = torch.randn(4, 6, 5, 5, dtype=torch.float64), torch.tensor([0, 1, 2, 1])
    net(inputs)
    options = {"settings": settings, "micro_batches": micro_batches, "weight_decay": 0.01}
    on_weight, _ = train(net, inputs, labels, application="weight", **options)
    on_sides, preconditioner = train(net, inputs, labels, application="auto", **options)
    for got, want in zip(on_sides, on_weight, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)
    del preconditioner


def test_the_cheap_sides_are_really_taken():
    """With few rows, a step without statistics leaves .grad preconditioned before step() and step() adds nothing."""
    net = make_net("plain")
    inputs = torch.randn(2, 6, 5, 5, dtype=torch.float64)
    net(inputs)
    preconditioner = KroneckerPreconditioner(
        net, settings=KroneckerSettings(structure="sua", application="auto", inverse_period=10)
    )
    net(inputs).square().sum(1).mean().backward()
    preconditioner.step()
    net.zero_grad()
    net(inputs).square().sum(1).mean().backward()
    before = net[2].weight.grad.clone()
    reference = torch.autograd.grad(net[2](net[1](net[0](inputs))).sum(), net[2].weight)[0]
    assert not torch.allclose(before, reference)
    preconditioner.step()
    torch.testing.assert_close(net[2].weight.grad, before, rtol=0, atol=0)


@pytest.mark.parametrize(
    "settings",
    [{}, {"group_size": 8}, {"group_size": 7}, {"inverse_method": "low_rank"}, {"inverse_method": "cholesky"}],
    ids=str,
)
@pytest.mark.parametrize("padding", [0, 1])
def test_patches_are_transformed_where_a_kfac_layer_has_few_rows(settings, padding):
    """With fewer rows than output channels the backward pass leaves K-FAC's gradient wholly preconditioned."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(9, 40, 3, padding=padding, bias=False), nn.Flatten()).double()
    inputs = torch.randn(2, 9, 3, 3, dtype=torch.float64)
    gradients = []
    for application in ("auto", "weight"):
        copied = copy.deepcopy(net)
        preconditioner = KroneckerPreconditioner(copied, application=application, inverse_period=10, **settings)
        for _ in range(2):
            copied.zero_grad()
            copied(inputs).square().sum(1).mean().backward()
            before = copied[0].weight.grad.clone()
            preconditioner.step()
        gradients.append(copied[0].weight.grad)
        assert torch.equal(before, copied[0].weight.grad) == (application == "auto")
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-10)


def test_removing_the_preconditioner_restores_forward():
    """After remove_hooks() the convolutions run their own forward and gradients are plain again."""
    net = make_net("plain")
    inputs = torch.randn(2, 6, 5, 5, dtype=torch.float64)
    net(inputs)
    preconditioner = KroneckerPreconditioner(net, settings=KroneckerSettings(application="auto"))
    assert "forward" in net[0].__dict__
    preconditioner.remove_hooks()
    assert "forward" not in net[0].__dict__
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in net.modules())
    del preconditioner


def test_autocast_takes_the_plain_path_and_mixing_is_an_error():
    """Under autocast the convolution stays ordinary; autocast on and off within one step is refused by name."""
    net = make_net("plain").float()
    inputs = torch.randn(2, 6, 5, 5)
    net(inputs)
    preconditioner = KroneckerPreconditioner(
        net, settings=KroneckerSettings(structure="sua", application="auto", inverse_period=10)
    )
    net(inputs).square().mean().backward()
    preconditioner.step()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        net(inputs).square().mean().backward()
    preconditioner.step()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        net(inputs).square().mean().backward()
    net(inputs).square().mean().backward()
    with pytest.raises(RuntimeError, match=r"'0': the parts of its accumulated gradient .* application=weight"):
        preconditioner.step()


def test_ragged_micro_batches_are_refused_rather_than_mixed():
    """Micro-batches so different that other sides are cheaper cannot share one accumulated gradient."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(4, 40, 3, bias=False), nn.Flatten(), nn.Linear(360, 3)).double()
    preconditioner = KroneckerPreconditioner(net, structure="sua", application="auto", inverse_period=10)
    net(torch.randn(4, 4, 5, 5, dtype=torch.float64)).square().sum(1).mean().backward()
    preconditioner.step()
    net.zero_grad()
    for size in (9, 1):
        net(torch.randn(size, 4, 5, 5, dtype=torch.float64)).square().sum(1).mean().backward()
    before = net[2].weight.grad.clone()
    with pytest.raises(RuntimeError, match="application=weight"):
        preconditioner.step()
    assert torch.equal(net[2].weight.grad, before)  # nothing was changed before the error


def test_two_forward_passes_before_one_backward_keep_their_sides():
    """Each backward uses the sides and the inverse of its own forward pass."""
    net = make_net("plain")
    inputs, labels = torch.randn(4, 6, 5, 5, dtype=torch.float64), torch.tensor([0, 1, 2, 1])
    net(inputs)
    results = []
    for application in ("weight", "auto"):
        model = copy.deepcopy(net)
        preconditioner = KroneckerPreconditioner(model, structure="sua", application=application)
        for _ in range(2):
            model.zero_grad()
            first, second = (nn.functional.cross_entropy(model(x), y) for x, y in ((inputs, labels), (-inputs, labels)))
            ((first + second) / 2).backward()
            preconditioner.step()
        results.append([parameter.grad for parameter in model.parameters()])
    for got, want in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


def test_a_frozen_bias_stays_in_the_output():
    """A convolution with a bias, trainable or not, keeps its own forward."""
    net = nn.Sequential(nn.Conv2d(4, 30, 3), nn.Flatten(), nn.Linear(270, 3))
    net[0].bias.requires_grad_(False)
    inputs = torch.randn(2, 4, 5, 5)
    expected = net(inputs)
    preconditioner = KroneckerPreconditioner(net, application="auto", inverse_period=5)
    net(inputs).square().mean().backward()
    preconditioner.step()
    assert torch.equal(net(inputs), expected)


def test_double_backward_is_refused():
    """Differentiating a preconditioned gradient again would be silently wrong."""
    net = make_net("plain")
    inputs = torch.randn(4, 6, 5, 5, dtype=torch.float64, requires_grad=True)
    net(inputs)
    preconditioner = KroneckerPreconditioner(net, structure="sua", application="auto")
    net(inputs).square().sum(1).mean().backward()
    preconditioner.step()
    (grad,) = torch.autograd.grad(net(inputs).sum(), inputs, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.square().sum().backward()


def test_passes_that_are_paused_are_plain_and_leave_no_trace():
    """Inside paused() a weight gradient is the plain one, and passes of other sizes do not disturb the next step."""
    net = make_net("plain")
    inputs = torch.randn(2, 6, 5, 5, dtype=torch.float64)
    net(inputs)
    preconditioner = KroneckerPreconditioner(net, structure="sua", application="auto", inverse_period=10)
    net(inputs).square().sum(1).mean().backward()
    preconditioner.step()
    weight = net[2].weight
    with preconditioner.paused():
        (inside,) = torch.autograd.grad(net(inputs).square().sum(1).mean(), weight)
        adversarial = torch.randn(200, 6, 5, 5, dtype=torch.float64, requires_grad=True)
        torch.autograd.grad(net(adversarial).square().sum(1).mean(), adversarial)
    preconditioner_free = copy.deepcopy(net)
    (want,) = torch.autograd.grad(preconditioner_free(inputs).square().sum(1).mean(), preconditioner_free[2].weight)
    torch.testing.assert_close(inside, want, rtol=1e-12, atol=1e-12)
    net.zero_grad()
    net(inputs).square().sum(1).mean().backward()
    assert not torch.allclose(weight.grad, want)  # the backward pass preconditions again
    preconditioner.step()
