"""The preconditioned gradient: inverse factors times a layer's weight and bias gradients.

The weight gradient, in the order ``[out, taps, in]``, is viewed as ``[conv_groups, P, p, t, Q, d]`` (see
``grouping``). PyTorch flattens row-major, so in that order the dense operator is ``kron(gradient_factor,
activation_factor)`` for K-FAC and ``kron(gradient_factor, I_T, channel_factor)`` for SUA, block by block.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kfac_sua.preconditioner.grouping import BiasBlock, BlockLayout
from kfac_sua.preconditioner.inverse import EigenBasis, Inverse
from kfac_sua.preconditioner.statistics import LayerFactors


@dataclass(frozen=True)
class Sides:
    """The two sides of a layer's Kronecker product."""

    activation: bool
    gradient: bool

    def complement(self) -> "Sides":
        """Return the sides that are not in this."""
        return Sides(activation=not self.activation, gradient=not self.gradient)


BOTH_SIDES = Sides(activation=True, gradient=True)
NEITHER_SIDE = Sides(activation=False, gradient=False)


@dataclass
class LayerInverse:
    """Inverse of a layer's damped Kronecker product under factored damping.

    Args:
        activation: Inverse of the damped activation factor.
        gradient: Inverse of the damped gradient factor, already divided by the block's scale.
        bias_scale: 1 / (1 + activation damping), ``[conv_groups]``: the inverse of the separate bias block's scalar
            activation factor.
    """

    activation: Inverse
    gradient: Inverse
    bias_scale: Tensor

    @property
    def like(self) -> Tensor:
        """A tensor of the factors' device and precision."""
        return self.bias_scale

    def tensors(self) -> list[Tensor]:
        """Return all that is read when it is applied."""
        return [*self.activation.tensors().values(), *self.gradient.tensors().values(), self.bias_scale]


@dataclass
class LayerEigenbasis:
    """Eigenbases of a layer's factors, for exact damping.

    Args:
        activation: Eigenbasis of the activation factor.
        gradient: Eigenbasis of the gradient factor.
        scale: S under ``expand``, 1 under ``reduce``; a 0-d tensor, as a captured step reads it where it lies.
        damping: ε on the block; a 0-d tensor likewise.
    """

    activation: EigenBasis
    gradient: EigenBasis
    scale: Tensor
    damping: Tensor

    @property
    def like(self) -> Tensor:
        """A tensor of the factors' device and precision."""
        return self.activation.values

    def tensors(self) -> list[Tensor]:
        """Return all that is read when it is applied."""
        return [*self.activation.tensors().values(), *self.gradient.tensors().values(), self.scale, self.damping]


def precondition_(
    weight_grad: Tensor,
    bias_grad: Tensor | None,
    layout: BlockLayout,
    inverse: LayerInverse | LayerEigenbasis,
    sides: Sides = BOTH_SIDES,
) -> None:
    """Replace a layer's gradients by the preconditioned ones, in place.

    Args:
        weight_grad: ``[out, in, kh, kw]`` of a convolution (``in`` per convolution group) or ``[out, in]``.
        bias_grad: ``[out]``; ``None`` where the layer has no trainable bias.
        layout: The layer's block layout.
        inverse: Inverse of its damped block.
        sides: Sides to apply, where the gradient already carries the other (see ``two_sided``).
    """
    if not (sides.activation or sides.gradient):
        return
    dtype = inverse.like.dtype
    blocks = _to_blocks(weight_grad.to(dtype), None if bias_grad is None else bias_grad.to(dtype), layout)
    separate_bias = None
    if bias_grad is not None and layout.bias is BiasBlock.SEPARATE:
        separate_bias = bias_grad.to(dtype)
    if isinstance(inverse, LayerInverse):
        result = precondition_factored(blocks, inverse, sides)
        bias = None if separate_bias is None else _bias_factored(separate_bias, layout, inverse)
    else:
        result = precondition_exact(blocks, inverse)
        bias = None if separate_bias is None else _bias_exact(separate_bias, layout, inverse)
    joint_bias = _from_blocks(result, layout, weight_grad)
    bias = joint_bias if bias is None else bias
    if bias_grad is not None and bias is not None:
        bias_grad.copy_(bias.reshape(bias_grad.shape))


def precondition_factored(blocks: Tensor, inverse: LayerInverse, sides: Sides = BOTH_SIDES) -> Tensor:
    """Multiply ``[g, P, p, t, Q, d]`` by both inverse factors (or by one), block by block."""
    g, num_p, p, t, num_q, d = blocks.shape
    if sides.gradient:
        blocks = inverse.gradient.left(blocks.reshape(g * num_p, p, t * num_q * d)).view(blocks.shape)
    if not sides.activation:
        return blocks
    return _weight_view(inverse.activation.right(_activation_view(blocks)), blocks.shape)


def precondition_exact(blocks: Tensor, basis: LayerEigenbasis) -> Tensor:
    """Apply (scale · Ā ⊗ Ḡ + ε I)⁻¹ to ``[g, P, p, t, Q, d]`` in the factors' eigenbases."""
    rotated = _rotate(blocks, basis.gradient.vectors.mT, basis.activation.vectors)
    g, num_p, p, _, num_q, d = blocks.shape
    gradient_values = basis.gradient.values.view(g, num_p, p, 1, 1, 1)
    activation_values = basis.activation.values.view(g, 1, 1, 1, num_q, d)
    rotated = rotated / (basis.scale * gradient_values * activation_values + basis.damping)
    return _rotate(rotated, basis.gradient.vectors, basis.activation.vectors.mT)


def quadratic_form(weight: Tensor, bias: Tensor | None, layout: BlockLayout, factors: LayerFactors) -> Tensor:
    """Return vᵀ (scale · Ā ⊗ Ḡ) v, the layer's undamped Fisher block between a vector of its parameters and itself.

    Args:
        weight: The weight's part of v, ``[out, in, kh, kw]`` or ``[out, in]``.
        bias: The bias's part, ``[out]``; ``None`` where the layer has no trainable bias.
        layout: The layer's block layout.
        factors: Its undamped factors.

    Returns:
        A 0-d tensor, on the device.
    """
    dtype = factors.gradient.values.dtype
    bias = None if bias is None else bias.to(dtype)
    blocks = _to_blocks(weight.to(dtype), bias, layout)  # [g, P, p, t, Q, d]
    g, num_p, p, t, num_q, d = blocks.shape
    left = factors.gradient.times(blocks.reshape(g * num_p, p, t * num_q * d)).view(blocks.shape)
    product = _weight_view(factors.activation.times(_activation_view(left).mT).mT, blocks.shape)
    total = (blocks * product).sum()
    if bias is not None and layout.bias is BiasBlock.SEPARATE:
        columns = _bias_blocks(bias, layout)  # [g · P, p, 1]; the bias's activation factor is 1
        total = total + (columns * factors.gradient.times(columns)).sum()
    return factors.scale * total


def _rotate(blocks: Tensor, gradient_matrix: Tensor, activation_matrix: Tensor) -> Tensor:
    g, num_p, p, t, num_q, d = blocks.shape
    left = torch.bmm(gradient_matrix, blocks.reshape(g * num_p, p, t * num_q * d)).view(blocks.shape)
    return _weight_view(torch.bmm(_activation_view(left), activation_matrix), blocks.shape)


def _activation_view(blocks: Tensor) -> Tensor:
    """View ``[g, P, p, t, Q, d]`` as ``[g · Q, P · p · t, d]``, without a copy unless both g and Q exceed 1."""
    g, num_p, p, t, num_q, d = blocks.shape
    return blocks.reshape(g, num_p * p * t, num_q, d).transpose(1, 2).reshape(g * num_q, num_p * p * t, d)


def _weight_view(values: Tensor, shape: torch.Size) -> Tensor:
    """Undo :func:`_activation_view`: ``[g · Q, P · p · t, d]`` to a view ``[g, P, p, t, Q, d]``."""
    g, num_p, p, t, num_q, d = shape
    return values.view(g, num_q, num_p, p, t, d).permute(0, 2, 3, 4, 1, 5)


def _bias_factored(bias_grad: Tensor, layout: BlockLayout, inverse: LayerInverse) -> Tensor:
    columns = _bias_blocks(bias_grad, layout)  # [g · P, p, 1]
    scale = inverse.bias_scale.repeat_interleave(layout.gradient.count)
    return _merge_bias(inverse.gradient.left(columns) * scale[:, None, None], layout)


def _bias_exact(bias_grad: Tensor, layout: BlockLayout, basis: LayerEigenbasis) -> Tensor:
    columns = torch.bmm(basis.gradient.vectors.mT, _bias_blocks(bias_grad, layout))
    columns = columns / (basis.scale * basis.gradient.values.unsqueeze(-1) + basis.damping)
    return _merge_bias(torch.bmm(basis.gradient.vectors, columns), layout)


def _bias_blocks(bias_grad: Tensor, layout: BlockLayout) -> Tensor:
    split = layout.gradient.split(bias_grad.view(layout.conv_groups, -1))  # [g, P, p]
    return split.flatten(0, 1).unsqueeze(-1)


def _merge_bias(columns: Tensor, layout: BlockLayout) -> Tensor:
    return layout.gradient.merge(columns.view(layout.conv_groups, layout.gradient.count, -1))


def _to_blocks(weight_grad: Tensor, bias_grad: Tensor | None, layout: BlockLayout) -> Tensor:
    """Return the gradient as ``[g, P, p, t, Q, d]``; without a copy where possible (channels_last)."""
    values = weight_grad if weight_grad.dim() == 4 else weight_grad[:, :, None, None]
    values = values.permute(0, 2, 3, 1).flatten(1, 2)  # [out, taps, in]
    values = layout.activation.split(values)  # [out, taps, Q, a]
    if layout.taps_in_features:
        values = values.transpose(1, 2).flatten(2).unsqueeze(1)  # [out, 1, Q, taps · a]
    if layout.bias is BiasBlock.JOINT:  # Q = 1; a bias frozen since contributes nothing
        column = values.new_zeros(len(values)) if bias_grad is None else bias_grad
        values = torch.cat([values, column[:, None, None, None]], dim=-1)
    return _split_outputs(values, layout)


def _split_outputs(values: Tensor, layout: BlockLayout) -> Tensor:
    groups = layout.gradient
    values = values.unflatten(0, (layout.conv_groups, groups.num_channels))  # [g, out, t, Q, d]
    if groups.num_padded:
        values = torch.nn.functional.pad(values, (0, 0, 0, 0, 0, 0, 0, groups.num_padded))
    return values.unflatten(1, (groups.count, groups.size))


def _from_blocks(blocks: Tensor, layout: BlockLayout, weight_grad: Tensor) -> Tensor | None:
    """Write ``[g, P, p, t, Q, d]`` back into the weight gradient and return the joint bias, if any."""
    values = blocks.flatten(1, 2)[:, : layout.gradient.num_channels].flatten(0, 1)  # [out, t, Q, d]
    bias = None
    if layout.bias is BiasBlock.JOINT:
        bias, values = values[..., -1], values[..., :-1]
    if layout.taps_in_features:
        values = values.squeeze(1).unflatten(-1, (layout.num_taps, -1)).transpose(1, 2)  # [out, taps, Q, a]
    values = layout.activation.merge(values)  # [out, taps, in]
    target = weight_grad if weight_grad.dim() == 4 else weight_grad[:, :, None, None]
    target.permute(0, 2, 3, 1).copy_(values.unflatten(1, target.shape[2:]))
    return bias
