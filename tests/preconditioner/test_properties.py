"""Properties of the whole operator: descent, linearity, symmetry, limits, permutations, what is left alone."""

import copy

import pytest
import torch
from torch import nn

from kfac_sua.preconditioner import KroneckerPreconditioner, KroneckerSettings

VARIANTS = [
    {"structure": structure, "group_size": group_size, "damping_rule": rule, "weight_sharing": sharing}
    for structure in ("kfac", "sua")
    for group_size in (None, 2, 3)
    for rule in ("factored", "factored_pi", "exact")
    for sharing in ("expand", "reduce")
]


def make_net() -> nn.Module:
    """Return a float64 net with biases, a grouped and a strided convolution, batch norm and a linear head."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 4, 3, stride=2, groups=2),
        nn.Flatten(),
        nn.Linear(4 * 4, 3),
    ).double()


def ready(settings: dict, net: nn.Module | None = None) -> tuple[nn.Module, KroneckerPreconditioner]:
    """Return a net and a preconditioner that has refreshed once, two-step period passed."""
    net = net or make_net()
    preconditioner = KroneckerPreconditioner(
        net, settings=KroneckerSettings(damping=0.05, inverse_period=100, **settings)
    )
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(5, 4, 6, 6, generator=generator, dtype=torch.float64)
    nn.functional.cross_entropy(net(inputs), torch.tensor([0, 1, 2, 1, 0])).backward()
    preconditioner.step()
    return net, preconditioner


def apply_to(net, preconditioner, gradients):
    """Precondition given gradients."""
    for parameter, gradient in zip(net.parameters(), gradients, strict=True):
        parameter.grad = gradient.clone()
    preconditioner.precondition_()
    return [parameter.grad.clone() for parameter in net.parameters()]


def random_gradients(net, seed):
    """Return gradients unrelated to any loss."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in net.parameters()]


def inner(first, second):
    """Return the inner product of two lists of tensors."""
    return float(sum((a * b).sum() for a, b in zip(first, second, strict=True)))


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(str(x) for x in v.values()))
def test_operator_is_linear_symmetric_and_positive(variant):
    """P(ag + bh) = aPg + bPh, ⟨h, Pg⟩ = ⟨Ph, g⟩ and ⟨g, Pg⟩ > 0 for random gradients, biases included."""
    net, preconditioner = ready(variant)
    g, h = random_gradients(net, 1), random_gradients(net, 2)
    pg, ph = apply_to(net, preconditioner, g), apply_to(net, preconditioner, h)
    mixed = apply_to(net, preconditioner, [2 * a - 3 * b for a, b in zip(g, h, strict=True)])
    for got, a, b in zip(mixed, pg, ph, strict=True):
        torch.testing.assert_close(got, 2 * a - 3 * b, rtol=1e-9, atol=1e-9)
    assert inner(h, pg) == pytest.approx(inner(ph, g), rel=1e-9)
    for index in range(len(g)):  # every parameter on its own, the biases among them
        alone = [gradient if i == index else torch.zeros_like(gradient) for i, gradient in enumerate(g)]
        assert inner(alone, apply_to(net, preconditioner, alone)) > 0


@pytest.mark.parametrize("rule", ["factored", "factored_pi", "exact"])
def test_large_damping_tends_to_a_multiple_of_the_gradient(rule):
    """With ε far above the curvature, P = 1/ε on every weight (and a joint bias)."""
    net = make_net()
    settings = KroneckerSettings(structure="kfac", damping=1e9, damping_rule=rule)
    preconditioner = KroneckerPreconditioner(net, settings=settings)
    inputs = torch.randn(5, 4, 6, 6, dtype=torch.float64)
    nn.functional.cross_entropy(net(inputs), torch.tensor([0, 1, 2, 1, 0])).backward()
    plain = [parameter.grad.clone() for parameter in net.parameters()]
    preconditioner.step()
    for index in (0, 4, 6, 7):  # weights, and the joint bias of the head
        torch.testing.assert_close(
            list(net.parameters())[index].grad * 1e9,
            plain[index],
            rtol=2e-3,
            atol=2e-3 * float(plain[index].abs().max()),
        )


def test_other_parameters_keep_the_plain_gradient():
    """Batch-norm parameters, skipped and frozen layers are bit-equal to the plain gradient."""
    net = make_net()
    net[3].weight.requires_grad_(False)
    plain = copy.deepcopy(net)
    preconditioner = KroneckerPreconditioner(net, skip=["5"])
    inputs = torch.randn(5, 4, 6, 6, dtype=torch.float64)
    for model in (net, plain):
        nn.functional.cross_entropy(model(inputs), torch.tensor([0, 1, 2, 1, 0])).backward()
    preconditioner.step()
    untouched = ["1.weight", "1.bias", "3.bias", "5.weight", "5.bias"]
    reference = dict(plain.named_parameters())
    for name, parameter in net.named_parameters():
        if parameter.grad is not None:
            assert torch.equal(parameter.grad, reference[name].grad) == (name in untouched), name


@pytest.mark.parametrize("structure", ["kfac", "sua"])
@pytest.mark.parametrize("group_size", [None, 3])
def test_channel_permutations_commute(structure, group_size):
    """Permuting input channels (within groups, when grouped) permutes the preconditioned gradient alike."""
    order = torch.tensor([2, 0, 1, 5, 3, 4])
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 4, 3, padding=1).double()
    permuted = copy.deepcopy(conv)
    permuted.weight.data = conv.weight.data[:, order]
    inputs = torch.randn(5, 6, 4, 4, dtype=torch.float64)
    results = []
    for module, values in ((conv, inputs), (permuted, inputs[:, order])):
        preconditioner = KroneckerPreconditioner(module, structure=structure, group_size=group_size)
        module(values).sin().flatten(1).sum(1).mean().backward()
        preconditioner.step()
        results.append(module.weight.grad)
    torch.testing.assert_close(results[0][:, order], results[1], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("structure", ["kfac", "sua"])
def test_one_group_equals_no_grouping(structure):
    """A group size of at least the channels is no grouping, joint bias included."""
    results = []
    for group_size in (None, 16, 64):
        net, _ = ready({"structure": structure, "group_size": group_size})
        results.append([parameter.grad for parameter in net.parameters()])
    for other in results[1:]:
        for got, want in zip(other, results[0], strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("variant", VARIANTS[::5], ids=lambda v: "-".join(str(x) for x in v.values()))
def test_grouped_convolution_equals_separate_convolutions(variant):
    """Conv2d(groups=3) is preconditioned as three convolutions side by side."""
    torch.manual_seed(0)
    joint = nn.Conv2d(6, 9, 3, padding=1, groups=3).double()
    parts = [nn.Conv2d(2, 3, 3, padding=1).double() for _ in range(3)]
    for part, weight, bias in zip(parts, joint.weight.chunk(3), joint.bias.chunk(3), strict=True):
        part.weight.data.copy_(weight)
        part.bias.data.copy_(bias)
    inputs = torch.randn(4, 6, 4, 4, dtype=torch.float64)

    def grads(model, module_list):
        preconditioner = KroneckerPreconditioner(model, settings=KroneckerSettings(damping=0.1, **variant))
        outputs = torch.cat([m(x) for m, x in zip(module_list, inputs.chunk(len(module_list), 1), strict=True)], 1)
        outputs.sin().flatten(1).sum(1).mean().backward()
        preconditioner.step()
        return torch.cat([m.weight.grad for m in module_list]), torch.cat([m.bias.grad for m in module_list])

    for got, want in zip(grads(joint, [joint]), grads(nn.ModuleList(parts), parts), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_loss_reduction_gives_the_per_example_factor(reduction):
    """A mean loss and a summed loss describe the same Fisher: that of p − e_y at the logits."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 3)).double()
    inputs, labels = torch.randn(5, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 1, 0])
    preconditioner = KroneckerPreconditioner(net, loss_reduction=reduction)
    nn.functional.cross_entropy(net(inputs), labels, reduction=reduction).backward()
    preconditioner.update_factors()
    gradient = preconditioner._layers["0"].average.corrected().gradient.dense()[0]
    residual = net(inputs).softmax(-1).detach() - nn.functional.one_hot(labels, 3)
    torch.testing.assert_close(gradient, residual.T @ residual / 5, rtol=1e-9, atol=1e-14)
