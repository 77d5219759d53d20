"""The pre-activation ResNet50 against its equations written out, and its size by hand arithmetic."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

from kfac_sua.models import PreActResNet50
from kfac_sua.models.preact_resnet import PreActBottleneck


def thin_model() -> PreActResNet50:
    """Return a width-1/8 network in float64 with normalisation statistics as after some training."""
    torch.manual_seed(0)
    model = PreActResNet50(10, width=0.125).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, mean=1.0, std=0.3)
            nn.init.normal_(module.bias, std=0.3)
            nn.init.normal_(module.get_buffer("running_mean"), std=0.3)
            nn.init.uniform_(module.get_buffer("running_var"), 0.5, 2.0)
    return model


def normalised(inputs: Tensor, norm: nn.BatchNorm2d) -> Tensor:
    """Apply batch normalisation in evaluation mode by its formula."""
    mean, variance = norm.get_buffer("running_mean"), norm.get_buffer("running_var")
    scale = norm.weight / (variance + norm.eps) ** 0.5
    return (inputs - mean[:, None, None]) * scale[:, None, None] + norm.bias[:, None, None]


def bottleneck(inputs: Tensor, block: PreActBottleneck, stride: int) -> Tensor:
    """Compute one block from He et al. (2016b): x + W3 a(W2 a(W1 a(x))), a = ReLU of the normalisation."""
    activated = normalised(inputs, block.norm1).clamp(min=0)
    hidden = F.conv2d(activated, block.conv1.weight)
    hidden = F.conv2d(normalised(hidden, block.norm2).clamp(min=0), block.conv2.weight, stride=stride, padding=1)
    hidden = F.conv2d(normalised(hidden, block.norm3).clamp(min=0), block.conv3.weight)
    if block.projection is None:
        return inputs + hidden
    return F.conv2d(activated, block.projection.weight, stride=stride) + hidden


def test_parameter_count() -> None:
    """Exactly 23,513,162 for 10 classes.

    Convolutions: a first block with c input and p bottleneck channels has c·p + 9p² + 4p² + 4cp, a further one
    4p² + 9p² + 4p². Stages: 73,728 + 2·69,632; 376,832 + 3·278,528; 1,507,328 + 5·1,114,112; 6,029,312 + 2·4,456,448;
    together 23,445,504; the stem has 3·64·9 = 1,728.
    Batch normalisation, twice the channels: 1,920 + 5,632 + 17,408 + 16,384 and 2·2048 at the end: 45,440.
    Head: 2048·10 + 10 = 20,490.
    """
    count = sum(parameter.numel() for parameter in PreActResNet50(10).parameters())
    assert count == 1_728 + 23_445_504 + 45_440 + 20_490 == 23_513_162


def test_fifty_layers_and_four_projections() -> None:
    """1 + 16·3 + 1 layers, plus one projection where each stage begins; no convolution has a bias."""
    model = PreActResNet50(10)
    convolutions = {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    projections = [name for name in convolutions if name.endswith("projection")]
    assert len(convolutions) - len(projections) + 1 == 50
    assert projections == [f"blocks.{first}.projection" for first in (0, 3, 7, 13)]
    assert all(module.bias is None for module in convolutions.values())


def test_widest_layers_are_the_papers() -> None:
    """Sec. 3.2: 2048 channels with 1×1 filters and 512 channels with 3×3 filters."""
    layers = [module for module in PreActResNet50(10).modules() if isinstance(module, nn.Conv2d)]
    for kernel_size, expected in (((1, 1), 2048), ((3, 3), 512)):
        chosen = [layer for layer in layers if layer.kernel_size == kernel_size]
        assert max(layer.in_channels for layer in chosen) == expected
        assert max(layer.out_channels for layer in chosen) == expected


def test_logits_equal_the_equations() -> None:
    """Stem, 16 blocks with strides 1, 2, 2, 2, a final normalisation and ReLU, mean over pixels, linear head."""
    model = thin_model().eval()
    inputs = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    hidden = F.conv2d(inputs, model.stem.weight, padding=1)
    for index, block in enumerate(model.blocks):
        assert isinstance(block, PreActBottleneck)
        hidden = bottleneck(hidden, block, stride=2 if index in (3, 7, 13) else 1)
    assert hidden.shape == (3, 4 * 64, 4, 4)
    pooled = normalised(hidden, model.final_norm).clamp(min=0).mean((2, 3))
    expected = pooled @ model.classifier.weight.T + model.classifier.bias
    torch.testing.assert_close(model(inputs), expected, rtol=1e-10, atol=1e-10)


def test_final_activation_is_there() -> None:
    """With its shift far below zero, the last ReLU must silence everything but the head's bias."""
    model = thin_model().eval()
    nn.init.constant_(model.final_norm.bias, -1e6)
    nn.init.normal_(model.classifier.bias)
    logits = model(torch.randn(2, 3, 32, 32, dtype=torch.float64))
    torch.testing.assert_close(logits, model.classifier.bias.expand(2, 10))


def test_identity_shortcut_is_untouched() -> None:
    """With a silent residual branch a block passes its input on unchanged, negative values included."""
    block = PreActBottleneck(32, 8, stride=1)
    nn.init.zeros_(block.conv3.weight)
    inputs = torch.randn(2, 32, 8, 8)
    before = inputs.clone()
    assert block.projection is None
    assert torch.equal(block(inputs), before)
    assert torch.equal(inputs, before)


@pytest.mark.parametrize(("in_channels", "stride"), [(32, 2), (16, 1)])
def test_projection_reads_the_activated_input(in_channels: int, stride: int) -> None:
    """Where the shape changes, the shortcut sees the normalised and rectified input, never the raw one."""
    block = PreActBottleneck(in_channels, 8, stride=stride)
    nn.init.zeros_(block.conv3.weight)
    nn.init.constant_(block.norm1.bias, -1e6)
    assert block.projection is not None
    assert not block(torch.randn(2, in_channels, 8, 8)).any()
    assert block(torch.randn(2, in_channels, 8, 8)).shape == (2, 32, 8 // stride, 8 // stride)


def test_width_scales_all_channels() -> None:
    """Half the width halves every convolution's channels but the three colours."""
    full, half = PreActResNet50(10), PreActResNet50(100, width=0.5)
    for one, other in zip(full.modules(), half.modules(), strict=True):
        if isinstance(one, nn.Conv2d):
            assert isinstance(other, nn.Conv2d)
            assert other.out_channels * 2 == one.out_channels
            assert other.in_channels == (3 if one.in_channels == 3 else one.in_channels // 2)
    assert half(torch.zeros(2, 3, 32, 32)).shape == (2, 100)
    with pytest.raises(ValueError, match=r"^model.width must be > 0 and finite, got -0.5\.$"):
        PreActResNet50(10, width=-0.5)


def test_gradient_reaches_every_parameter() -> None:
    """No parameter is left out of the graph."""
    model = thin_model()
    F.cross_entropy(model(torch.randn(6, 3, 32, 32, dtype=torch.float64)), torch.arange(6)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_hooks_see_what_made_each_weight_gradient() -> None:
    """Inputs and output gradients seen by hooks must reproduce every weight gradient, in spite of in-place ReLUs."""
    model = thin_model()
    inputs_of: dict[str, Tensor] = {}
    output_grads_of: dict[str, Tensor] = {}

    def watch(name: str, layer: nn.Module) -> None:
        def record(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            inputs_of[name] = inputs[0].detach()
            output.register_hook(lambda grad: output_grads_of.__setitem__(name, grad))

        layer.register_forward_hook(record)

    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    for name, layer in layers.items():
        watch(name, layer)
    F.cross_entropy(model(torch.randn(6, 3, 32, 32, dtype=torch.float64)), torch.arange(6)).backward()
    for name, layer in layers.items():
        rebuilt = conv2d_weight(
            inputs_of[name],
            layer.weight.shape,
            output_grads_of[name],
            stride=layer.stride,
            padding=layer.padding,
        )
        torch.testing.assert_close(rebuilt, layer.weight.grad, rtol=1e-9, atol=1e-12)


def test_first_loss_is_that_of_equal_probabilities() -> None:
    """Small start values of the head make the first loss about ln 10 in spite of 16 summed branches."""
    torch.manual_seed(0)
    model = PreActResNet50(10, width=0.25)
    loss = F.cross_entropy(model(torch.randn(20, 3, 32, 32)), torch.arange(20) % 10)
    assert loss.item() == pytest.approx(math.log(10), abs=0.2)
