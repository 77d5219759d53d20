"""The whole chain (hooks, factors, damping, inverse, application) against dense solves with the Kronecker matrix."""

import itertools

import pytest
import torch
from layer_cases import LAYERS, mean_loss, plain_gradients
from oracles import dense_precondition
from torch import nn

from kfac_sua.preconditioner import KroneckerPreconditioner, KroneckerSettings

STRUCTURES = [("kfac", None), ("sua", None), ("kfac", 2), ("sua", 2), ("kfac", 3), ("sua", 16)]


def precondition_case(name: str, settings: KroneckerSettings, num_examples: int = 5):
    """Return the preconditioned gradients of a layer case and the oracle's."""
    module, inputs = LAYERS[name].build(num_examples=num_examples)
    expected = dense_precondition(module, inputs, *plain_gradients(module, inputs), settings)
    preconditioner = KroneckerPreconditioner(module, settings=settings)
    mean_loss(module(inputs)).backward()
    preconditioner.step()
    return (module.weight.grad, None if module.bias is None else module.bias.grad), expected


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(("structure", "group_size"), STRUCTURES)
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_every_layer_and_structure_equals_the_dense_solve(name, structure, group_size, sharing):
    """Every geometry under every structure and sharing is preconditioned as the dense matrix says."""
    settings = KroneckerSettings(structure=structure, group_size=group_size, weight_sharing=sharing, damping=0.05)
    actual, expected = precondition_case(name, settings)
    assert_gradients_close(actual, expected)


@pytest.mark.parametrize("name", ["linear_bias", "conv_bias", "conv_groups", "conv_strided"])
@pytest.mark.parametrize(
    ("rule", "structure"), list(itertools.product(["factored", "factored_pi", "exact"], STRUCTURES))
)
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_every_damping_rule_equals_the_dense_solve(name, rule, structure, sharing):
    """All three damping rules mean the same ε in every structure, bias included, ragged groups included."""
    settings = KroneckerSettings(
        structure=structure[0],
        group_size=structure[1],
        weight_sharing=sharing,
        damping_rule=rule,
        damping=0.2,
    )
    actual, expected = precondition_case(name, settings)
    assert_gradients_close(actual, expected)


@pytest.mark.parametrize("method", ["cholesky", "low_rank"])
@pytest.mark.parametrize("name", ["linear_bias", "conv", "conv_bias", "conv_groups"])
@pytest.mark.parametrize(("structure", "group_size"), STRUCTURES)
def test_woodbury_and_cholesky_equal_the_dense_solve(name, method, structure, group_size):
    """The low-rank inverse is exact, with fewer rows than features and with more."""
    for num_examples in (1, 7):
        settings = KroneckerSettings(structure=structure, group_size=group_size, inverse_method=method, damping=0.1)
        actual, expected = precondition_case(name, settings, num_examples=num_examples)
        assert_gradients_close(actual, expected)


def assert_gradients_close(actual, expected):
    """Compare weight and bias gradients at rtol 1e-9 relative to the largest entry."""
    for got, want in zip(actual, expected, strict=True):
        if want is None:
            assert got is None
            continue
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9 * float(want.abs().max()))


@pytest.mark.parametrize("make", [lambda: nn.Linear(1, 7, bias=False), lambda: nn.Conv2d(1, 7, 1, bias=False)])
def test_a_gradient_without_a_place_for_every_number_is_not_written_into(make):
    """A product written into an expanded gradient would be wrong without a word: PyTorch refuses the copy."""
    torch.manual_seed(0)
    net = make()
    preconditioner = KroneckerPreconditioner(net, damping=0.1)
    output = net(torch.randn(5, 1, *[2, 2][: net.weight.dim() - 2]))
    output.square().flatten(1).sum(1).mean().backward()
    preconditioner.step()
    net.weight.grad = torch.ones(1).expand(net.weight.shape)
    with pytest.raises(RuntimeError, match="more than one element of the written-to tensor"):
        preconditioner.precondition_()
