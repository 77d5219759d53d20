"""VGG11: size, layers and start values, by hand arithmetic and against the paper's numbers."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kfac_sua.models import VGG11


def convolutions(model: nn.Module) -> list[nn.Conv2d]:
    """Return all convolutions in order."""
    return [module for module in model.modules() if isinstance(module, nn.Conv2d)]


def test_parameter_count() -> None:
    """Exactly 9,228,362 for 10 classes.

    Convolutions: 9·(3·64 + 64·128 + 128·256 + 256·256 + 256·512 + 3·512·512) = 9·1,024,192 = 9,217,728.
    Batch normalisation: 2·(64 + 128 + 2·256 + 4·512) = 5,504. Head: 512·10 + 10 = 5,130.
    """
    assert sum(parameter.numel() for parameter in VGG11(10).parameters()) == 9_217_728 + 5_504 + 5_130 == 9_228_362


def test_without_batch_norm_biases_take_its_place() -> None:
    """9,217,728 weights, a bias for each of 64 + 128 + 2·256 + 4·512 = 2,752 channels, and the head: 9,225,610."""
    model = VGG11(10, batch_norm=False)
    assert sum(parameter.numel() for parameter in model.parameters()) == 9_217_728 + 2_752 + 5_130 == 9_225_610
    kinds = [type(layer).__name__ for layer in VGG11(10).features]
    assert [type(layer).__name__ for layer in model.features] == [kind for kind in kinds if kind != "BatchNorm2d"]
    assert all(layer.bias is not None for layer in convolutions(model))


def test_largest_factors_are_the_papers() -> None:
    """Sec. 3.1: matrices to invert are at most 4608×4608 under K-FAC and 512×512 under SUA."""
    layers = convolutions(VGG11(10))
    assert max(layer.weight[0].numel() for layer in layers) == 4608
    assert max(max(layer.in_channels, layer.out_channels) for layer in layers) == 512
    head = VGG11(10).classifier
    assert (head.in_features, head.out_features) == (512, 10)


def test_order_of_layers() -> None:
    """Configuration A: each 3×3 convolution without bias is followed by batch normalisation and ReLU."""
    names = {"Conv2d": "c", "BatchNorm2d": "b", "ReLU": "r", "MaxPool2d": "M"}
    assert "".join(names[type(layer).__name__] for layer in VGG11(10).features) == (
        "cbrM" + "cbrM" + "cbrcbrM" + "cbrcbrM" + "cbrcbrM"
    )
    layers = convolutions(VGG11(10))
    assert [layer.out_channels for layer in layers] == [64, 128, 256, 256, 512, 512, 512, 512]
    for layer in layers:
        assert layer.bias is None
        assert (layer.kernel_size, layer.padding, layer.stride) == ((3, 3), (1, 1), (1, 1))


@pytest.mark.parametrize(
    ("width", "expected"), [(0.25, [16, 32, 64, 128]), (0.1, [8, 13, 26, 51]), (1.5, [96, 192, 384, 768])]
)
def test_width_scales_all_channels(width: float, expected: list[int]) -> None:
    """Channels are multiplied and rounded, and never fall below 8."""
    model = VGG11(100, width=width)
    assert sorted({layer.out_channels for layer in convolutions(model)}) == expected
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 100)


@pytest.mark.parametrize("width", [0.0, -1.0, math.inf, math.nan])
def test_impossible_width_names_the_key(width: float) -> None:
    """A width that is no positive number is refused in the user's own words."""
    with pytest.raises(ValueError, match=rf"^model.width must be > 0 and finite, got {width}\.$"):
        VGG11(10, width=width)


@pytest.mark.parametrize("batch_norm", [True, False])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_gradient_reaches_every_parameter(memory_format: torch.memory_format, batch_norm: bool) -> None:
    """No parameter is left out of the graph, in either layout."""
    torch.manual_seed(0)
    model = VGG11(10, width=0.25, batch_norm=batch_norm).to(memory_format=memory_format)
    inputs = torch.randn(8, 3, 32, 32).contiguous(memory_format=memory_format)
    F.cross_entropy(model(inputs), torch.arange(8)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_start_values() -> None:
    """He's fan-out variance for convolutions, 0.01 for the head, so that the first loss is about ln 10."""
    torch.manual_seed(0)
    model = VGG11(10)
    for layer in convolutions(model):
        expected = math.sqrt(2 / (9 * layer.out_channels))
        assert layer.weight.std().item() == pytest.approx(expected, rel=0.06)
        assert abs(layer.weight.mean().item()) < 5 * expected / math.sqrt(layer.weight.numel())
    assert model.classifier.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert not model.classifier.bias.any()
    loss = F.cross_entropy(model(torch.randn(20, 3, 32, 32)), torch.arange(20) % 10)
    assert loss.item() == pytest.approx(math.log(10), abs=0.2)


def test_start_values_without_batch_norm() -> None:
    """He's fan-in variance and zero biases, so that activations keep their scale through all layers."""
    torch.manual_seed(0)
    model = VGG11(10, batch_norm=False)
    for layer in convolutions(model):
        assert layer.weight.std().item() == pytest.approx(math.sqrt(2 / (9 * layer.in_channels)), rel=0.06)
        assert layer.bias is not None
        assert not layer.bias.any()
    inputs = torch.randn(20, 3, 32, 32)
    activations = model.features(inputs)
    assert 0.5 < (activations.square().mean() / inputs.square().mean()).sqrt() < 2.5  # poolings raise it
    loss = F.cross_entropy(model(inputs), torch.arange(20) % 10)
    assert loss.item() == pytest.approx(math.log(10), abs=0.2)


def test_start_values_follow_the_global_seed() -> None:
    """One seed, one network."""
    models = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        models.append(VGG11(10, width=0.125))
    first, same, other = (torch.cat([p.flatten() for p in model.parameters()]) for model in models)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
