"""The network for tests: small, complete, and able to learn."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kfac_sua.data import BatchLoader, load_digits, make_splits
from kfac_sua.models import TinyConvNet


def test_parameter_count() -> None:
    """3·16·9 + 16·32·9 + 2·(16 + 32) + 4·32·10 + 10 = 432 + 4,608 + 96 + 1,290 = 6,426."""
    assert sum(parameter.numel() for parameter in TinyConvNet(10).parameters()) == 6_426


def test_without_batch_norm_biases_take_its_place() -> None:
    """432 + 4,608 weights of convolutions, 16 + 32 biases, and the head's 1,290: 6,378."""
    model = TinyConvNet(10, batch_norm=False)
    assert sum(parameter.numel() for parameter in model.parameters()) == 6_378
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())


def test_kinds_of_layers() -> None:
    """It has what the preconditioner must handle: a strided and a plain convolution, and a linear layer."""
    layers = [module for module in TinyConvNet(10).modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    assert [type(layer).__name__ for layer in layers] == ["Conv2d", "Conv2d", "Linear"]
    assert [layer.stride for layer in layers[:2]] == [(2, 2), (1, 1)]
    assert all(layer.bias is None for layer in layers[:2])


@pytest.mark.parametrize(("width", "channels"), [(1.0, (16, 32)), (2.0, (32, 64)), (0.1, (8, 8))])
def test_width_and_output_shape(width: float, channels: tuple[int, int]) -> None:
    """Channels scale, at least 8, and the logits have one column per class."""
    model = TinyConvNet(7, width=width)
    assert tuple(m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d)) == channels
    assert model(torch.zeros(3, 3, 32, 32)).shape == (3, 7)


@pytest.mark.parametrize("batch_norm", [True, False])
def test_it_learns_the_digits(batch_norm: bool) -> None:
    """Six epochs of plain SGD must bring the validation error from 90 % to below 20 % (measured: 3 to 7 %)."""
    splits = make_splits(*load_digits(), validation_size=250, train_size=None, split_seed=0)
    torch.manual_seed(0)
    model = TinyConvNet(10, batch_norm=batch_norm)
    # At a rate of 0.1 the rounding of a processor alone moves the error between 4 % and 22 %.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9)
    loader = BatchLoader(splits.train, splits.mean, splits.std, batch_size=50)
    for epoch in range(6):
        for inputs, labels in loader.epoch(0, epoch):
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), labels).backward()
            optimizer.step()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
    model.eval()
    ((inputs, labels),) = BatchLoader(splits.val, splits.mean, splits.std).sequential(250)
    with torch.no_grad():
        error = (model(inputs).argmax(1) != labels).double().mean().item()
    assert error < 0.2
