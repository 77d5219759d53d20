"""Layers and inputs that cover every supported geometry, as data."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class LayerCase:
    """A layer and the shape of one example of its input."""

    make: Callable[[], nn.Module]
    input_shape: tuple[int, ...]

    def build(self, seed: int = 0, num_examples: int = 5) -> tuple[nn.Module, Tensor]:
        """Return the layer in float64 and an input with non-zero mean."""
        torch.manual_seed(seed)
        module = self.make().double()
        return module, torch.randn(num_examples, *self.input_shape, dtype=torch.float64) + 0.3


LAYERS: dict[str, LayerCase] = {
    "linear": LayerCase(lambda: nn.Linear(5, 4, bias=False), (5,)),
    "linear_bias": LayerCase(lambda: nn.Linear(5, 4), (5,)),
    "linear_sequence": LayerCase(lambda: nn.Linear(5, 4), (3, 5)),
    "linear_two_extra": LayerCase(lambda: nn.Linear(5, 4), (2, 3, 5)),
    "conv": LayerCase(lambda: nn.Conv2d(5, 4, 3, padding=1, bias=False), (5, 4, 5)),
    "conv_bias": LayerCase(lambda: nn.Conv2d(5, 4, 3, padding=1), (5, 4, 4)),
    "conv_1x1": LayerCase(lambda: nn.Conv2d(5, 4, 1), (5, 3, 3)),
    "conv_1x1_strided": LayerCase(lambda: nn.Conv2d(5, 4, 1, stride=2, bias=False), (5, 4, 4)),
    "conv_strided": LayerCase(lambda: nn.Conv2d(5, 3, 3, stride=2, padding=1), (5, 6, 5)),
    "conv_dilated": LayerCase(lambda: nn.Conv2d(3, 4, (3, 2), dilation=2, padding=(2, 1)), (3, 5, 6)),
    "conv_same": LayerCase(lambda: nn.Conv2d(3, 4, (2, 4), padding="same"), (3, 4, 5)),
    "conv_valid": LayerCase(lambda: nn.Conv2d(3, 4, 3, padding="valid", stride=(1, 2)), (3, 4, 6)),
    "conv_reflect": LayerCase(lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), (3, 4, 4)),
    "conv_circular": LayerCase(lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular", stride=2), (3, 4, 4)),
    "conv_replicate": LayerCase(lambda: nn.Conv2d(3, 4, 3, padding="same", padding_mode="replicate"), (3, 4, 3)),
    "conv_groups": LayerCase(lambda: nn.Conv2d(6, 4, 3, padding=1, groups=2), (6, 4, 3)),
    "conv_depthwise": LayerCase(lambda: nn.Conv2d(4, 4, 3, stride=2, padding=1, groups=4), (4, 5, 5)),
    "conv_groups_no_bias": LayerCase(lambda: nn.Conv2d(8, 8, 2, groups=2, bias=False), (8, 3, 3)),
}


def mean_loss(output: Tensor) -> Tensor:
    """Return a fixed non-quadratic loss, summed over outputs and averaged over examples."""
    generator = torch.Generator().manual_seed(1)
    target = torch.randn(output.shape, generator=generator, dtype=output.dtype)
    return ((output - target) ** 2 + 0.3 * output.sin()).flatten(1).sum(1).mean()


def plain_gradients(module: nn.Module, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the un-averaged output gradients, the weight gradient and the bias gradient of :func:`mean_loss`."""
    output = module(inputs)
    parameters = [module.weight] + ([] if module.bias is None else [module.bias])
    output_grad, *grads = torch.autograd.grad(mean_loss(output), [output, *parameters])
    return output_grad * len(inputs), grads[0], grads[1] if len(grads) > 1 else None
