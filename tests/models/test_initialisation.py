"""The schemes of initial weights: names, bits of the default, and the moments that each promises."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from kfac_sua.build import build_model
from kfac_sua.compose import compose_config
from kfac_sua.config import Initialisation
from kfac_sua.models import VGG11
from kfac_sua.models.initialisation import SCHEMES, initialise_

NETS = {
    "vgg11": ("model=vgg11", "model.width=0.5"),
    "without batch norm": ("model=vgg11", "model.width=0.5", "model.batch_norm=false"),
    "preact_resnet50": ("model=preact_resnet50", "model.width=0.25"),
    "transformer": ("model=transformer", "model.width=0.5"),
    "tiny": ("model=tiny",),
}


def network(name: str, *overrides: str) -> nn.Module:
    """Return a network as a run begins with it."""
    torch.manual_seed(5)
    return build_model(compose_config([*NETS[name], *overrides]), 10, torch.device("cpu"))


def layers(model: nn.Module) -> tuple[list[nn.Conv2d], list[nn.Linear], nn.Linear]:
    """Return convolutions, hidden linear layers and the classifier."""
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    *hidden, classifier = [module for module in model.modules() if isinstance(module, nn.Linear)]
    return convolutions, hidden, classifier


def assert_moments(weight: Tensor, std: float) -> None:
    """Check mean and standard deviation to six standard errors, as those of a normal distribution."""
    error = 6 / math.sqrt(weight.numel())
    assert abs(weight.std().item() / std - 1) < error / math.sqrt(2)
    assert abs(weight.mean().item() / std) < error


def assert_uniform(values: Tensor, std: float) -> None:
    """Check the moments, and that nothing lies beyond √3 standard deviations, where a uniform distribution ends."""
    if values.numel() > 100:
        assert_moments(values, std)
    assert 0 < values.abs().max().item() <= math.sqrt(3) * std * (1 + 1e-6)  # rounding of the bound


def assert_no_bias(layer: nn.Conv2d | nn.Linear) -> None:
    """Check that a layer has no bias, or one of zeros."""
    assert layer.bias is None or not layer.bias.any()


def test_the_configuration_names_every_scheme() -> None:
    """All that the command line can choose can be carried out, and the other way round."""
    assert [scheme.value for scheme in Initialisation] == list(SCHEMES)


@pytest.mark.parametrize("name", NETS)
def test_default_has_the_bits_of_before_the_key(name: str) -> None:
    """One normal draw per weight, layer by layer, with the deviations of before."""
    model, twin = network(name), network(name, "model.initialisation=pytorch")
    torch.manual_seed(7)
    initialise_(model)
    torch.manual_seed(7)
    convolutions, _, classifier = layers(twin)
    with torch.no_grad():
        for layer in (module for module in twin.modules() if isinstance(module, nn.Conv2d | nn.Linear)):
            if layer in convolutions:
                channels = layer.out_channels if layer.bias is None else layer.in_channels
                layer.weight.normal_(0, math.sqrt(2) / math.sqrt(channels * layer.weight[0, 0].numel()))
            else:
                layer.weight.normal_(0, 0.01 if layer is classifier else 1 / math.sqrt(layer.in_features))
            if layer.bias is not None:
                layer.bias.zero_()
    for (key, value), other in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        if key != "positions":  # a parameter of no layer, drawn when the network was made
            assert torch.equal(value, other), key


@pytest.mark.parametrize("name", NETS)
def test_he_fan_in(name: str) -> None:
    """Convolutions keep the scale of activations; the classifier is PyTorch's, its bias included."""
    convolutions, hidden, classifier = layers(network(name, "model.initialisation=he_fan_in"))
    for convolution in convolutions:
        assert_moments(convolution.weight, math.sqrt(2 / convolution.weight[0].numel()))
        assert_no_bias(convolution)
    for layer in hidden:
        assert_moments(layer.weight, 1 / math.sqrt(layer.in_features))
        assert_no_bias(layer)
    for values in (classifier.weight, classifier.bias):
        assert_uniform(values, 1 / math.sqrt(3 * classifier.in_features))


@pytest.mark.parametrize("name", NETS)
def test_xavier(name: str) -> None:
    """Glorot and Bengio's eq. 16 for all weights; no bias."""
    convolutions, hidden, classifier = layers(network(name, "model.initialisation=xavier"))
    for layer in (*convolutions, *hidden, classifier):
        fans = layer.weight[0].numel() + layer.weight[:, 0].numel()
        assert_uniform(layer.weight, math.sqrt(2 / fans))
        assert_no_bias(layer)


@pytest.mark.parametrize("name", NETS)
def test_pytorch(name: str) -> None:
    """All layers as PyTorch makes them."""
    convolutions, hidden, classifier = layers(network(name, "model.initialisation=pytorch"))
    for layer in (*convolutions, *hidden, classifier):
        std = 1 / math.sqrt(3 * layer.weight[0].numel())
        assert_uniform(layer.weight, std)
        if layer.bias is not None:
            assert_uniform(layer.bias, std)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_normalisation_layers_and_positions_are_left(scheme: str) -> None:
    """Scale 1 and shift 0, and positions of deviation 0.02, under every scheme."""
    for name in ("vgg11", "transformer"):
        model = network(name, f"model.initialisation={scheme}")
        norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d | nn.LayerNorm)]
        assert norms
        assert all((norm.weight == 1).all() and not norm.bias.any() for norm in norms)
    assert_moments(model.get_parameter("positions"), 0.02)


def test_unknown_scheme_names_the_key() -> None:
    """In the user's own words, with the choices."""
    with pytest.raises(ValueError, match=r"^model.initialisation must be one of he_fan_out, .*, pytorch, got 'he'\.$"):
        VGG11(10, width=0.125, initialisation="he")
