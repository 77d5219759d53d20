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


def gradients_of(parts, *, structure="sua", make=lambda: make_net("plain")):
    """Return the preconditioned gradients under ``weight`` and ``auto`` of a step in several parts, after a refresh."""
    results = []
    for application in ("weight", "auto"):
        net = make()
        preconditioner = KroneckerPreconditioner(net, structure=structure, application=application, inverse_period=10)
        net(torch.randn(4, *INPUT, dtype=torch.float64, generator=generator(0))).square().sum(1).mean().backward()
        preconditioner.step()
        net.zero_grad()
        parts(net, preconditioner)
        preconditioner.step()
        results.append([parameter.grad for parameter in net.parameters()])
        assert not preconditioner.events
    return zip(*results, strict=True)


INPUT = 6, 5, 5


def generator(seed):
    """Return a source of inputs."""
    return torch.Generator().manual_seed(seed)


def loss_of(net, size, seed=1):
    """Return the loss of a micro-batch."""
    inputs = torch.randn(size, *INPUT, dtype=torch.float64, generator=generator(seed))
    return net(inputs.requires_grad_()).square().sum(1).mean()


def uneven(net, preconditioner):
    """Accumulate micro-batches of which the one has many rows and the other few, and an empty one."""
    for size in (40, 1, 12):
        loss_of(net, size).backward()
    net(torch.zeros(0, *INPUT, dtype=torch.float64)).sum().backward()


def few_first(net, preconditioner):
    """The same, with the sides of the small one first."""
    for size in (1, 40):
        loss_of(net, size).backward()


def paused_last(net, preconditioner):
    """Add the gradient of a pass inside paused()."""
    loss_of(net, 2).backward()
    with preconditioner.paused():
        loss_of(net, 2, seed=2).backward()


def paused_first(net, preconditioner):
    """The same, in the other order."""
    with preconditioner.paused():
        loss_of(net, 2, seed=2).backward()
    loss_of(net, 2).backward()


def autocast_last(net, preconditioner):
    """Add the gradient of a pass under autocast, which leaves float64 as it is."""
    loss_of(net, 2).backward()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss_of(net, 2, seed=2).backward()


def gradient_penalty(net, preconditioner):
    """Add the squared norm of the input gradient to the loss."""
    inputs = torch.randn(2, *INPUT, dtype=torch.float64, generator=generator(1), requires_grad=True)
    loss = net(inputs).square().sum(1).mean()
    (grad,) = torch.autograd.grad(loss, inputs, create_graph=True)
    (loss + grad.square().sum()).backward()


def weight_gradient_penalty(net, preconditioner):
    """Add the squared norm of the weight gradient to the loss."""
    loss = loss_of(net, 2)
    grads = torch.autograd.grad(loss, [net[0].weight, net[2].weight], create_graph=True)
    (loss + sum(grad.square().sum() for grad in grads)).backward()


def retained_graph(net, preconditioner):
    """Send two losses backward through one forward pass, one of them with a graph of its own."""
    loss = loss_of(net, 2)
    loss.backward(create_graph=True)
    loss.square().backward()


PARTS = [
    uneven,
    few_first,
    paused_last,
    paused_first,
    autocast_last,
    gradient_penalty,
    weight_gradient_penalty,
    retained_graph,
]


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph")
@pytest.mark.parametrize("structure", ["sua", "kfac"])
@pytest.mark.parametrize("parts", PARTS, ids=lambda parts: parts.__name__)
def test_all_parts_of_a_step_carry_the_sides_of_the_first(parts, structure):
    """Whatever a step's gradient is made up of, the result is that of preconditioning the sum."""
    for on_weight, on_sides in gradients_of(parts, structure=structure):
        torch.testing.assert_close(on_sides, on_weight, rtol=1e-9, atol=1e-12)


def test_autocast_takes_the_plain_path():
    """Under autocast the convolution stays ordinary, and its gradient plain until step()."""
    net = make_net("plain").float()
    inputs = torch.randn(2, 6, 5, 5)
    net(inputs)
    preconditioner = KroneckerPreconditioner(net, structure="sua", application="auto", inverse_period=10)
    net(inputs).square().mean().backward()
    preconditioner.step()
    grads = []
    for model in (net, copy.deepcopy(net)):
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(inputs).square().mean().backward()
        grads.append(model[2].weight.grad)
    assert torch.equal(*grads)


def test_a_gradient_that_is_asked_for_is_plain():
    """``torch.autograd.grad`` with respect to a weight returns the plain gradient, which no step preconditions."""
    net = make_net("plain")
    loss_of(net, 2)
    preconditioner = KroneckerPreconditioner(net, structure="sua", application="auto", inverse_period=10)
    loss_of(net, 4).backward()
    preconditioner.step()
    net.zero_grad()
    (got,) = torch.autograd.grad(loss_of(net, 2), net[2].weight)
    twin = copy.deepcopy(net)
    (want,) = torch.autograd.grad(loss_of(twin, 2), twin[2].weight)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)
    loss_of(net, 2).backward()
    assert not torch.allclose(net[2].weight.grad, want)  # this one is


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
