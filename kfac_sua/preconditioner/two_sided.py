"""Preconditioning the two sides of a weight gradient instead of the gradient.

A weight gradient is a sum over rows, V = Σ δ hᵀ, hence Ḡ⁻¹ V Ā⁻¹ = Σ (Ḡ⁻¹δ)(Ā⁻¹h)ᵀ. Where a layer has fewer rows than
its weight has vectors (late layers: few locations, many channels) it is cheaper to transform output gradients and
inputs inside the layer's backward pass than to multiply the weight gradient; the result is the same to rounding. A
side whose rows are many stays with the weight gradient, and on a GPU one that saves less than its launches take.
K-FAC's activation side transforms patches rather than pixels, so there the weight gradient is the product of output
gradients and transformed patches instead of a convolution.

It needs the inverses before the backward pass, so a mini-batch on which statistics or inverses are due is applied to
the weight gradient instead: no step ever uses older inverses than it otherwise would.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.grad import conv2d_input, conv2d_weight

from kfac_sua.preconditioner.capture import PhaseSource, is_transformed
from kfac_sua.preconditioner.forms import Inverse
from kfac_sua.preconditioner.forms.cost import SideCost
from kfac_sua.preconditioner.forms.patch_rows import PatchRows
from kfac_sua.preconditioner.forms.unfold import output_size, to_locations
from kfac_sua.preconditioner.geometry import BlockLayout, ChannelGroups, LayerGeometry
from kfac_sua.preconditioner.kronecker import NEITHER_SIDE, KroneckerInverse, Sides
from kfac_sua.preconditioner.precision import application_precision, fits
from kfac_sua.preconditioner.stand_in import ForwardStandIn


def can_be_two_sided(module: nn.Module, geometry: LayerGeometry) -> bool:
    """Whether a layer's gradient can be preconditioned inside its backward pass: zero-padded convolutions, no bias."""
    left, right, top, bottom = geometry.padding
    return (
        isinstance(module, nn.Conv2d)
        and module.bias is None
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


class TwoSidedForward(ForwardStandIn):
    """Stands in for the ``forward`` of one convolution; plain unless :attr:`inverse` is set.

    Where processes share a mini-batch, their gradients are added up, so that all must apply the same sides: then
    :attr:`num_examples` says of how many examples these are chosen for.

    Args:
        name: The layer's name, for messages.
        module: The convolution.
        geometry: Its geometry.
        layout: Its block layout.
        costs: Work on its activation and on its gradient side.
        phases: Where the time of the transformations is accounted.
    """

    _module: nn.Conv2d

    def __init__(
        self,
        name: str,
        module: nn.Conv2d,
        geometry: LayerGeometry,
        layout: BlockLayout,
        costs: tuple[SideCost, SideCost],
        phases: PhaseSource,
    ) -> None:
        self.inverse: KroneckerInverse | None = None
        self.costs = costs
        self.num_examples: int | None = None
        self.geometry = geometry
        self.layout = layout
        self.phases = phases
        self.options = _ConvolutionOptions(
            geometry.stride,
            (geometry.padding[2], geometry.padding[0]),
            geometry.dilation,
            geometry.conv_groups,
        )
        self._name = name
        self._applied: set[Sides] = set()
        self._was_compiled = False
        super().__init__(module)

    def __call__(self, input: Tensor) -> Tensor:
        """Run the convolution; ``input`` as ``nn.Conv2d`` takes it."""
        module, inverse = self._module, self.inverse
        if inverse is None or not torch.is_grad_enabled() or not module.weight.requires_grad:
            return type(module).forward(module, input)
        if torch.compiler.is_compiling():
            self._was_compiled = True
            return type(module).forward(module, input)
        if is_transformed() or not isinstance(module._parameters.get("weight"), nn.Parameter):
            return type(module).forward(module, input)  # a pass of torch.func: its gradient does not get into .grad
        sides = self._cheaper_sides(input, inverse)
        if sides == NEITHER_SIDE:
            output = type(module).forward(module, input)
            output.register_hook(lambda grad: self.note_backward(NEITHER_SIDE))
            return output
        result: Tensor = _TwoSidedConvolution.apply(input, module.weight, self, inverse, sides)
        return result

    def note_backward(self, sides: Sides) -> None:
        """Remember which sides a weight gradient that is about to be accumulated carries."""
        self._applied.add(sides)

    def forget_backward(self) -> None:
        """Forget the weight gradients noted, as when they are thrown away."""
        self._applied.clear()
        self._was_compiled = False

    def take_applied_sides(self) -> Sides:
        """Return which sides the gradient accumulated since the last call already carries.

        Raises:
            RuntimeError: If its parts carry different ones.
        """
        applied, self._applied = self._applied, set()
        if self._was_compiled:  # such a pass leaves no other note
            applied.add(NEITHER_SIDE)
        self._was_compiled = False
        if len(applied) > 1:
            raise RuntimeError(
                f"Layer {self._name!r}: the parts of its accumulated gradient were preconditioned differently in the "
                f"backward pass (autocast or torch.compile on and off, or very different batch sizes within one "
                f"step); use application=weight."
            )
        return applied.pop() if applied else NEITHER_SIDE

    def remove(self) -> None:
        """Give the module its own ``forward`` back."""
        self.inverse = None
        super().remove()

    def _cheaper_sides(self, inputs: Tensor, inverse: KroneckerInverse) -> Sides:
        """Return the sides that take less time on the rows of the mini-batch than on the weight gradient."""
        layout = self.layout
        if inputs.dim() != 4 or _is_autocast(inputs.device.type):
            return NEITHER_SIDE
        if not fits(inverse.like, self._module.weight):
            return NEITHER_SIDE  # the model has been moved since; step() moves the inverse too
        num_examples, _, height, width = inputs.shape
        num_examples = self.num_examples or num_examples
        pixels = num_examples * height * width
        locations = num_examples * math.prod(output_size(self.geometry, height, width))
        of_activation, of_gradient = self.costs
        rows = pixels if layout.feature_taps == 1 else locations
        can_take_activation = layout.feature_taps == 1 or layout.conv_groups == 1
        return Sides(
            activation=can_take_activation and rows < of_activation.two_sided_rows,
            gradient=locations < of_gradient.two_sided_rows,
        )


class _TwoSidedConvolution(torch.autograd.Function):
    """A convolution whose weight gradient is Σ (Ḡ⁻¹δ)(Ā⁻¹h)ᵀ; output and input gradient are the ordinary ones."""

    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, weight: Tensor, site: TwoSidedForward, inverse: KroneckerInverse, sides: Sides
    ) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        ctx.site, ctx.inverse, ctx.sides = site, inverse, sides
        options = site.options
        return F.conv2d(inputs, weight, None, options.stride, options.padding, options.dilation, options.groups)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *output_grads: Tensor) -> tuple[Tensor | None, ...]:
        (output_grad,) = output_grads
        inputs, weight = ctx.saved_tensors
        site, inverse, sides = ctx.site, ctx.inverse, ctx.sides
        options, layout = site.options, site.layout
        arguments = (options.stride, options.padding, options.dilation, options.groups)
        input_grad = weight_grad = None
        if ctx.needs_input_grad[0]:
            input_grad = conv2d_input(inputs.shape, weight, output_grad, *arguments)
        if ctx.needs_input_grad[1]:
            site.note_backward(sides)
            with site.phases.phase("application"), application_precision():
                if sides.gradient:
                    output_grad = _transform(
                        output_grad, inverse.gradient, layout.conv_groups, layout.gradient, inverse.like.dtype
                    )
                if sides.activation and layout.feature_taps == 1:
                    inputs = _transform(
                        inputs, inverse.activation, layout.conv_groups, layout.activation, inverse.like.dtype
                    )
                elif sides.activation:
                    rows = _transform_patches(inputs, site, inverse)
            if sides.activation and layout.feature_taps > 1:
                weight_grad = _weight_grad_of_rows(rows, output_grad, weight.shape)
            else:
                weight_grad = conv2d_weight(inputs, weight.shape, output_grad, *arguments)
        return input_grad, weight_grad, None, None, None


def _is_autocast(device_type: str) -> bool:
    """Whether autocast is on; on devices that do not have it, such as meta, PyTorch's own question raises."""
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def _transform(values: Tensor, inverse: Inverse, conv_groups: int, groups: ChannelGroups, dtype: torch.dtype) -> Tensor:
    """Multiply the channels of ``[n, conv_groups · channels, h, w]`` by inverse blocks, pixel by pixel."""
    pixels = values.to(dtype).permute(0, 2, 3, 1)  # [n, h, w, channels]
    rows = pixels.flatten(0, 2).unflatten(-1, (conv_groups, groups.num_channels))  # [rows, g, channels]
    blocks = groups.split(rows).flatten(1, 2).transpose(0, 1)  # [g · count, rows, size]
    result = inverse.right(blocks).transpose(0, 1).unflatten(1, (conv_groups, groups.count))  # [rows, g, count, size]
    # [rows, g, channels] to [n, g · channels, h, w]; unnamed, as reshape may copy
    return groups.merge(result).reshape(pixels.shape).permute(0, 3, 1, 2).to(values.dtype)


def _transform_patches(inputs: Tensor, site: TwoSidedForward, inverse: KroneckerInverse) -> Tensor:
    """Return the patches of ``[n, channels, h, w]`` times inverse blocks, ``[rows, taps · channels]``."""
    groups = site.layout.activation
    patches = PatchRows.read(to_locations(inputs.to(inverse.like.dtype), site.geometry), site.geometry)
    transformed = inverse.activation.right_of_patches(patches, groups)  # [Q, rows, taps · size]
    transformed = transformed.unflatten(-1, (site.layout.num_taps, -1)).permute(1, 2, 0, 3)  # [rows, taps, Q, size]
    return groups.merge(transformed).flatten(1).to(inputs.dtype)  # [rows, taps · channels]


def _weight_grad_of_rows(rows: Tensor, output_grad: Tensor, shape: torch.Size) -> Tensor:
    """Return Σ δ pᵀ over rows p, ``[rows, taps · channels]`` in the order of patches, in the shape of the weight."""
    grads = output_grad.permute(2, 3, 0, 1).flatten(0, 2)  # [rows, out]
    out_channels, _, height, width = shape
    weight_grad = (grads.mT @ rows).view(out_channels, height, width, -1)  # [out, kh, kw, channels]
    return weight_grad.permute(0, 3, 1, 2)  # [out, channels, kh, kw]
