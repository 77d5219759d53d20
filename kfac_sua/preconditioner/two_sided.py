"""Preconditioning the two sides of a weight gradient instead of the gradient.

A weight gradient is a sum over rows, V = Σ δ hᵀ, hence Ḡ⁻¹ V Ā⁻¹ = Σ (Ḡ⁻¹δ)(Ā⁻¹h)ᵀ. Where a layer has fewer rows than
its weight has vectors (late layers: few locations, many channels) it is cheaper to transform output gradients and
inputs inside the layer's backward pass than to multiply the weight gradient; the result is the same to rounding. A
side whose rows are many, and K-FAC's activation side, whose features are patches, stay with the weight gradient.

It needs the inverses before the backward pass, so a mini-batch on which statistics or inverses are due is applied to
the weight gradient instead: no step ever uses older inverses than it otherwise would.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_input, conv2d_weight

from kfac_sua.preconditioner.apply import NEITHER_SIDE, LayerInverse, Sides
from kfac_sua.preconditioner.capture import PhaseSource
from kfac_sua.preconditioner.grouping import BiasBlock, BlockLayout, ChannelGroups
from kfac_sua.preconditioner.inverse import Inverse
from kfac_sua.preconditioner.layers import LayerGeometry


def can_be_two_sided(geometry: LayerGeometry, layout: BlockLayout) -> bool:
    """Whether a layer's gradient can be preconditioned inside its backward pass: zero-padded convolutions, no bias."""
    left, right, top, bottom = geometry.padding
    return (
        geometry.is_convolution
        and layout.bias is BiasBlock.NONE
        and geometry.padding_mode == "zeros"
        and left == right
        and top == bottom
    )


@dataclass(frozen=True)
class _ConvolutionOptions:
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int


class TwoSidedForward:
    """Stands in for the ``forward`` of one convolution; plain unless :attr:`inverse` is set.

    Args:
        name: The layer's name, for messages.
        module: The convolution.
        geometry: Its geometry.
        layout: Its block layout.
        phases: Where the time of the transformations is accounted.
    """

    def __init__(
        self, name: str, module: nn.Conv2d, geometry: LayerGeometry, layout: BlockLayout, phases: PhaseSource
    ) -> None:
        self.inverse: LayerInverse | None = None
        self._name = name
        self._module = module
        self._layout = layout
        self._phases = phases
        self._options = _ConvolutionOptions(
            geometry.stride,
            (geometry.padding[2], geometry.padding[0]),
            geometry.dilation,
            geometry.conv_groups,
        )
        self._num_two_sided = 0
        self._num_plain = 0
        self._sides = NEITHER_SIDE
        module.forward = self  # type: ignore[method-assign]

    def __call__(self, input: Tensor) -> Tensor:
        """Run the convolution; ``input`` as ``nn.Conv2d`` takes it."""
        module = self._module
        if not torch.is_grad_enabled():
            return type(module).forward(module, input)
        sides = self._cheaper_sides(input)
        if not (sides.activation or sides.gradient):
            self._num_plain += 1
            return type(module).forward(module, input)
        self._sides = sides
        self._num_two_sided += 1
        output: Tensor = _TwoSidedConvolution.apply(input, module.weight, self)
        return output

    def take_applied_sides(self) -> Sides:
        """Return which sides the gradient accumulated since the last call already carries.

        Raises:
            RuntimeError: If only some of the forward passes were two-sided.
        """
        if self._num_two_sided and self._num_plain:
            raise RuntimeError(
                f"Layer {self._name!r} ran {self._num_two_sided} forward passes two-sided and {self._num_plain} plain "
                f"(autocast on and off, or very different batch sizes) within one step; use application=weight."
            )
        applied = self._sides if self._num_two_sided else NEITHER_SIDE
        self._num_two_sided = self._num_plain = 0
        return applied

    def remove(self) -> None:
        """Give the module its own ``forward`` back."""
        if self._module.__dict__.get("forward") is self:
            del self._module.forward

    def transformed_inputs(self, inputs: Tensor) -> Tensor:
        """Return Ā⁻¹h for every input pixel, or the inputs where that side stays with the weight gradient."""
        if not self._sides.activation:
            return inputs
        assert self.inverse is not None
        with self._phases.phase("application"):
            return _transform(inputs, self.inverse.activation, self._layout.conv_groups, self._layout.activation)

    def transformed_output_grads(self, output_grads: Tensor) -> Tensor:
        """Return Ḡ⁻¹δ for every location, or the gradients where that side stays with the weight gradient."""
        if not self._sides.gradient:
            return output_grads
        assert self.inverse is not None
        with self._phases.phase("application"):
            return _transform(output_grads, self.inverse.gradient, self._layout.conv_groups, self._layout.gradient)

    @property
    def options(self) -> _ConvolutionOptions:
        """Stride, padding, dilation and groups of the convolution."""
        return self._options

    def _cheaper_sides(self, inputs: Tensor) -> Sides:
        """Return the sides that have fewer rows than the weight gradient has vectors."""
        layout = self._layout
        if self.inverse is None or inputs.dim() != 4 or torch.is_autocast_enabled(inputs.device.type):
            return NEITHER_SIDE
        pixels = inputs.shape[0] * inputs.shape[2] * inputs.shape[3]
        (sh, sw) = self._options.stride
        locations = inputs.shape[0] * -(-inputs.shape[2] // sh) * -(-inputs.shape[3] // sw)  # about right: a choice
        per_pixel = layout.feature_taps == 1
        return Sides(
            activation=per_pixel and pixels < layout.gradient.num_channels * layout.identity_taps,
            gradient=locations < layout.activation.num_channels * layout.num_taps,
        )


class _TwoSidedConvolution(torch.autograd.Function):
    """A convolution whose weight gradient is Σ (Ḡ⁻¹δ)(Ā⁻¹h)ᵀ; output and input gradient are the ordinary ones."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, site: TwoSidedForward) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        ctx.site = site
        options = site.options
        return F.conv2d(inputs, weight, None, options.stride, options.padding, options.dilation, options.groups)

    @staticmethod
    def backward(ctx: Any, *output_grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (output_grad,) = output_grads
        inputs, weight = ctx.saved_tensors
        options = ctx.site.options
        arguments = (options.stride, options.padding, options.dilation, options.groups)
        input_grad = weight_grad = None
        if ctx.needs_input_grad[0]:
            input_grad = conv2d_input(inputs.shape, weight, output_grad, *arguments)
        if ctx.needs_input_grad[1]:
            weight_grad = conv2d_weight(
                ctx.site.transformed_inputs(inputs),
                weight.shape,
                ctx.site.transformed_output_grads(output_grad),
                *arguments,
            )
        return input_grad, weight_grad, None


def _transform(values: Tensor, inverse: Inverse, conv_groups: int, groups: ChannelGroups) -> Tensor:
    """Multiply the channels of ``[n, conv_groups · channels, h, w]`` by inverse blocks, pixel by pixel."""
    pixels = values.permute(0, 2, 3, 1)  # [n, h, w, channels]
    rows = groups.split(
        pixels.flatten(0, 2).unflatten(-1, (conv_groups, groups.num_channels))
    )  # [rows, g, count, size]
    blocks = rows.flatten(1, 2).transpose(0, 1)  # [g · count, rows, size]
    result = inverse.right(blocks).transpose(0, 1).unflatten(1, (conv_groups, groups.count))
    return groups.merge(result).reshape(pixels.shape).permute(0, 3, 1, 2)
