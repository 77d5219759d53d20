"""Factors of every layer of a small convolutional net against curvlinops' K-FAC operator."""

import warnings

import pytest
import torch
from torch import nn

from kfac_sua.preconditioner import KroneckerPreconditioner

curvlinops = pytest.importorskip("curvlinops", reason="curvlinops-for-pytorch is a development dependency")


def make_net() -> nn.Module:
    """Return a float64 net with strided, dilated and padded convolutions, with and without bias."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 5, 3, stride=2, bias=False),
        nn.Tanh(),
        nn.Conv2d(5, 4, 2, dilation=2, padding=1),
        nn.Sigmoid(),
        nn.Flatten(),
        nn.Linear(36, 6),
        nn.ReLU(),
        nn.Linear(6, 3),
    ).double()


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("fisher_type", ["empirical", "exact"])
def test_products_of_factors_equal_curvlinops(sharing, fisher_type):
    """Factors may split the scale differently, so the blocks scale · Ā ⊗ Ḡ of every layer are compared."""
    net = make_net()
    inputs, labels = torch.randn(7, 2, 8, 8, dtype=torch.float64), torch.arange(7) % 3
    parameters = dict(net.named_parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        operator = curvlinops.KFACLinearOperator(
            net,
            nn.CrossEntropyLoss(),
            list(parameters.values()),
            [(inputs, labels)],
            fisher_type={"empirical": "empirical", "exact": "type-2"}[fisher_type],
            kfac_approx=sharing,
            separate_weight_and_bias=False,
            check_deterministic=False,
        )
        dense = operator @ torch.eye(operator.shape[1], dtype=torch.float64)

    preconditioner = KroneckerPreconditioner(net, fisher_type=fisher_type, weight_sharing=sharing)
    outputs = net(inputs)
    preconditioner.fisher_backward(outputs)
    nn.functional.cross_entropy(outputs, labels).backward()
    preconditioner.update_factors()

    offsets = _offsets(parameters)
    for name, layer in preconditioner._layers.items():
        factors = layer.average.corrected()
        ours = factors.scale * torch.kron(factors.gradient.dense()[0], factors.activation.dense()[0])
        order = _our_order(layer, offsets[f"{name}.weight"], offsets.get(f"{name}.bias"))
        theirs = dense[order][:, order]
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9 * float(theirs.abs().max()))


def _offsets(parameters):
    offsets, start = {}, 0
    for name, parameter in parameters.items():
        offsets[name] = start
        start += parameter.numel()
    return offsets


def _our_order(layer, weight_offset, bias_offset):
    """Return positions in the flat parameter vector in our ``[out, taps, in (, bias)]`` order."""
    positions = torch.arange(layer.module.weight.numel()).view(layer.module.weight.shape) + weight_offset
    if positions.dim() == 4:
        positions = positions.permute(0, 2, 3, 1).flatten(1)
    if bias_offset is not None:
        positions = torch.cat([positions, torch.arange(len(positions))[:, None] + bias_offset], dim=1)
    return positions.flatten()
