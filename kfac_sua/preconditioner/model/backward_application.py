"""Applies an inverse inside a convolution's backward pass, to inputs and output gradients instead of the gradient.

A weight gradient is a sum over rows, V = Σ δ hᵀ, hence Ḡ⁻¹ V Ā⁻¹ = Σ (Ḡ⁻¹δ)(Ā⁻¹h)ᵀ. Late layers have few locations and
many channels, so fewer rows than the weight has vectors: there it is cheaper to transform output gradients and inputs
than to multiply the weight gradient, and the result is the same to rounding. Each of the two sides is decided by
itself: one with many rows, or on a GPU one that saves less time than its launches take, is applied to the weight
gradient. K-FAC's activation side transforms patches rather than pixels, so that its weight gradient is a product of
output gradients and transformed patches instead of a convolution.

The inverses must be there before the backward pass. So on mini-batches with statistics or a refresh they are applied to
the weight gradient: no step uses older inverses than it would otherwise.

All parts of a step's gradient carry the same sides: those of the first part that gets to ``.grad``. Parts that arrive
later with other sides (mini-batches of other sizes, calls under autocast or in ``paused()``, derivatives of a gradient)
are multiplied as they arrive. A gradient that does not get to ``.grad``, as of ``torch.autograd.grad``, stays plain.
"""

import math
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_input, conv2d_weight

from kfac_sua.preconditioner.apply import precondition_
from kfac_sua.preconditioner.forms import Inverse
from kfac_sua.preconditioner.forms.cost import SideCost
from kfac_sua.preconditioner.forms.patch_rows import PatchRows
from kfac_sua.preconditioner.forms.unfold import output_size, to_locations
from kfac_sua.preconditioner.geometry import BlockLayout, ChannelGroups, LayerGeometry
from kfac_sua.preconditioner.kronecker import NEITHER_SIDE, KroneckerInverse, Sides
from kfac_sua.preconditioner.model.autograd import GradUse, accumulation, is_transformed, use_of_grad
from kfac_sua.preconditioner.model.replaced_forward import ReplacedForward
from kfac_sua.preconditioner.phases import PhaseSource
from kfac_sua.preconditioner.precision import application_precision, fits


def can_apply_in_backward(module: nn.Module, geometry: LayerGeometry) -> bool:
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


class BackwardApplication(ReplacedForward):
    """Replaces the ``forward`` of one convolution; plain unless :attr:`inverse` is set.

    Processes that share a mini-batch add up their gradients, so all must apply the same sides: these are then chosen
    for :attr:`num_examples` examples, whatever the process at hand has.

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
        self.is_paused = False
        self.costs = costs
        self.num_examples: int | None = None
        self.geometry = geometry
        self.layout = layout
        self.phases = phases
        self.options = _ConvolutionOptions(
            geometry.stride,
            geometry.padding_before,
            geometry.dilation,
            geometry.conv_groups,
        )
        self._name = name
        self._sides: Sides | None = None
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
        if not fits(inverse.reference_tensor, module.weight):
            return type(module).forward(module, input)  # the model has been moved since; step() moves the inverse too
        sides = NEITHER_SIDE if self.is_paused else self._cheaper_sides(input)
        if sides == NEITHER_SIDE:
            weight: Tensor = _WeightWithSides.apply(module.weight, self, inverse)
            return module._conv_forward(input, weight, None)
        result: Tensor = _PreconditionedConvolution.apply(input, module.weight, self, inverse, sides)
        return result

    @property
    def weight(self) -> Tensor:
        """The convolution's weight."""
        return self._module.weight

    def sides_of_step(self, sides: Sides) -> Sides:
        """Return the sides that a weight gradient must carry which is about to be accumulated.

        Args:
            sides: Those that suit it best; they become the step's if this gradient is its first.
        """
        if self._sides is None:
            self._sides = NEITHER_SIDE if self._was_compiled else sides
        return self._sides

    def forget_backward(self) -> None:
        """Forget the weight gradients of the step, as when they are thrown away."""
        self._sides = None
        self._was_compiled = False

    def take_applied_sides(self) -> Sides:
        """Return which sides the gradient accumulated since the last call already carries.

        Raises:
            RuntimeError: If its parts carry different ones.
        """
        sides, was_compiled = self._sides or NEITHER_SIDE, self._was_compiled
        self.forget_backward()
        if was_compiled and sides != NEITHER_SIDE:  # a compiled pass has left its part plain
            raise RuntimeError(
                f"Layer {self._name!r}: the parts of its accumulated gradient were preconditioned differently in the "
                f"backward pass (torch.compile off and then on within one step); use application=weight."
            )
        return sides

    def remove(self) -> None:
        """Give the module its own ``forward`` back."""
        self.inverse = None
        super().remove()

    def _cheaper_sides(self, inputs: Tensor) -> Sides:
        """Return the sides that take less time on the rows of the mini-batch than on the weight gradient."""
        layout = self.layout
        if type(inputs) is not Tensor or inputs.dim() != 4 or not inputs.numel() or _is_autocast(inputs.device.type):
            return NEITHER_SIDE
        num_examples, _, height, width = inputs.shape
        num_examples = self.num_examples or num_examples
        pixels = num_examples * height * width
        locations = num_examples * math.prod(output_size(self.geometry, height, width))
        of_activation, of_gradient = self.costs
        rows = pixels if layout.feature_taps == 1 else locations
        can_take_activation = layout.feature_taps == 1 or layout.conv_groups == 1
        return Sides(
            activation=can_take_activation and rows < of_activation.backward_rows,
            gradient=locations < of_gradient.backward_rows,
        )


class _WeightWithSides(torch.autograd.Function):
    """The weight itself; on the way back its gradient is multiplied by the sides of the step."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, owner: BackwardApplication, inverse: KroneckerInverse) -> Tensor:
        ctx.owner, ctx.inverse = owner, inverse
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        if use_of_grad(accumulation(ctx.owner.weight)) is GradUse.ACCUMULATED:
            sides = ctx.owner.sides_of_step(NEITHER_SIDE)
            if sides != NEITHER_SIDE:
                grad = _Multiplied.apply(grad, ctx.owner, ctx.inverse, sides)
        return grad, None, None


class _Multiplied(torch.autograd.Function):
    """A weight gradient multiplied by sides of an inverse: a symmetric operator, and so its own derivative."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, owner: BackwardApplication, inverse: KroneckerInverse, sides: Sides) -> Tensor:
        ctx.owner, ctx.inverse, ctx.sides = owner, inverse, sides
        result = grad.clone()
        with owner.phases.phase("application"), application_precision():
            precondition_(result, None, owner.layout, inverse, sides)
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _Multiplied.apply(*grads, ctx.owner, ctx.inverse, ctx.sides), None, None, None


class _PreconditionedConvolution(torch.autograd.Function):
    """A convolution whose weight gradient is Σ (Ḡ⁻¹δ)(Ā⁻¹h)ᵀ; output and input gradient are the ordinary ones.

    Where derivatives of these gradients are asked for (``create_graph=True``), the ordinary weight gradient is
    multiplied instead, and so is what the derivatives send to the weight.
    """

    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, weight: Tensor, owner: BackwardApplication, inverse: KroneckerInverse, sides: Sides
    ) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        ctx.owner, ctx.inverse, ctx.sides = owner, inverse, sides
        options = owner.options
        return F.conv2d(inputs, weight, None, options.stride, options.padding, options.dilation, options.groups)

    @staticmethod
    def backward(ctx: Any, *output_grads: Tensor) -> tuple[Tensor | None, ...]:
        (output_grad,) = output_grads
        inputs, weight = ctx.saved_tensors
        owner, inverse = ctx.owner, ctx.inverse
        options = owner.options
        arguments = (options.stride, options.padding, options.dilation, options.groups)
        input_grad = weight_grad = None
        if ctx.needs_input_grad[0]:
            differentiable = _WeightWithSides.apply(weight, owner, inverse) if torch.is_grad_enabled() else weight
            input_grad = conv2d_input(inputs.shape, differentiable, output_grad, *arguments)
        use = use_of_grad(accumulation(owner.weight)) if ctx.needs_input_grad[1] else GradUse.NONE
        if use is GradUse.NONE:
            return input_grad, None, None, None, None
        sides = owner.sides_of_step(ctx.sides) if use is GradUse.ACCUMULATED else NEITHER_SIDE
        own = NEITHER_SIDE if torch.is_grad_enabled() else sides.common(ctx.sides)
        weight_grad = _weight_grad(inputs, weight.shape, output_grad, own, owner, inverse)
        if own != sides:
            weight_grad = _Multiplied.apply(weight_grad, owner, inverse, sides.without(own))
        return input_grad, weight_grad, None, None, None


def _weight_grad(
    inputs: Tensor,
    shape: torch.Size,
    output_grad: Tensor,
    sides: Sides,
    owner: BackwardApplication,
    inverse: KroneckerInverse,
) -> Tensor:
    """Return the weight gradient, multiplied by the given sides through inputs and output gradients."""
    options, layout = owner.options, owner.layout
    rows = None
    with owner.phases.phase("application") if sides != NEITHER_SIDE else nullcontext(), application_precision():
        dtype = inverse.reference_tensor.dtype
        if sides.gradient:
            output_grad = _transform(output_grad, inverse.gradient, layout.conv_groups, layout.gradient, dtype)
        if sides.activation and layout.feature_taps == 1:
            inputs = _transform(inputs, inverse.activation, layout.conv_groups, layout.activation, dtype)
        elif sides.activation:
            rows = _transform_patches(inputs, owner, inverse)
    if rows is not None:
        return _weight_grad_of_rows(rows, output_grad, shape)
    arguments = (options.stride, options.padding, options.dilation, options.groups)
    result: Tensor = conv2d_weight(inputs, shape, output_grad, *arguments)
    return result


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


def _transform_patches(inputs: Tensor, owner: BackwardApplication, inverse: KroneckerInverse) -> Tensor:
    """Return the patches of ``[n, channels, h, w]`` times inverse blocks, ``[rows, taps · channels]``."""
    groups = owner.layout.activation
    patches = PatchRows.read(to_locations(inputs.to(inverse.reference_tensor.dtype), owner.geometry), owner.geometry)
    transformed = inverse.activation.right_of_patches(patches, groups)  # [Q, rows, taps · size]
    transformed = transformed.unflatten(-1, (owner.layout.num_taps, -1)).permute(1, 2, 0, 3)  # [rows, taps, Q, size]
    return groups.merge(transformed).flatten(1).to(inputs.dtype)  # [rows, taps · channels]


def _weight_grad_of_rows(rows: Tensor, output_grad: Tensor, shape: torch.Size) -> Tensor:
    """Return Σ δ pᵀ over rows p, ``[rows, taps · channels]`` in the order of patches, in the shape of the weight."""
    grads = output_grad.permute(2, 3, 0, 1).flatten(0, 2)  # [rows, out]
    out_channels, _, height, width = shape
    weight_grad = (grads.mT @ rows).view(out_channels, height, width, -1)  # [out, kh, kw, channels]
    return weight_grad.permute(0, 3, 1, 2)  # [out, channels, kh, kw]
