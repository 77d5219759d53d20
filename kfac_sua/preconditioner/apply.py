"""The preconditioned gradient: inverse factors times a layer's weight and bias gradients.

The weight gradient, in the order ``[out, taps, in]``, is viewed as ``[conv_groups, P, p, t, Q, d]`` (see
``geometry``). PyTorch flattens row-major, so in that order the dense operator is ``kron(gradient_factor,
activation_factor)`` for K-FAC and ``kron(gradient_factor, I_T, channel_factor)`` for SUA, block by block.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kfac_sua.preconditioner.factors import LayerFactors
from kfac_sua.preconditioner.geometry import BiasBlock, BlockLayout
from kfac_sua.preconditioner.kronecker import BOTH_SIDES, LayerInverse, Sides, activation_view, weight_view


def precondition_(
    weight_grad: Tensor,
    bias_grad: Tensor | None,
    layout: BlockLayout,
    inverse: LayerInverse,
    sides: Sides = BOTH_SIDES,
) -> None:
    """Replace a layer's gradients by the preconditioned ones, in place.

    Args:
        weight_grad: ``[out, in, kh, kw]`` of a convolution (``in`` per convolution group) or ``[out, in]``.
        bias_grad: ``[out]``; ``None`` where the layer has no trainable bias.
        layout: The layer's block layout.
        inverse: Inverse of its damped block.
        sides: Sides to apply, where the other was already applied in the backward pass (see ``backward_application``).

    Reference: U = B⁻¹ V A⁻¹ for a weight gradient V: Martens & Grosse (2015), Sec. 4.2, from (B ⊗ A)⁻¹ = B⁻¹ ⊗ A⁻¹;
    Laurent et al. (2018), Sec. 1. Under SUA tap by tap (Sec. 2.1), in channel groups block by block (Sec. 2.2).
    """
    if not (sides.activation or sides.gradient):
        return
    dtype = inverse.reference_tensor.dtype
    blocks = to_blocks(weight_grad.to(dtype), None if bias_grad is None else bias_grad.to(dtype), layout)
    # Without gaps or overlap in memory, so that a product can be written over it.
    is_dense = weight_grad.is_contiguous() or (
        weight_grad.dim() == 4 and weight_grad.is_contiguous(memory_format=torch.channels_last)
    )
    if is_dense and blocks.data_ptr() == weight_grad.data_ptr():
        # The blocks are a view of the whole gradient: there was nothing to pad, append or reorder.
        inverse.apply_(blocks, sides)
        bias = None
    else:
        bias = from_blocks(inverse.apply(blocks, sides), layout, weight_grad)
    if bias_grad is not None and layout.bias is BiasBlock.SEPARATE:
        columns = _bias_blocks(bias_grad.to(dtype), layout)  # [g · P, p, 1]
        bias = _merged_bias(inverse.apply_to_bias(columns), layout)  # [g, out]
    if bias_grad is not None and bias is not None:
        bias_grad.copy_(bias.reshape(bias_grad.shape))  # [out]


def multiplied(
    weight: Tensor, bias: Tensor | None, layout: BlockLayout, factors: LayerFactors
) -> tuple[Tensor, Tensor | None]:
    """Return (scale · Ḡ ⊗ Ā) v, with the layer's undamped Fisher block, for a vector v of its parameters.

    Args:
        weight: Entries of v for the weight, ``[out, in, kh, kw]`` or ``[out, in]``.
        bias: Entries of v for the bias, ``[out]``; ``None`` where the layer has no trainable bias.
        layout: The layer's block layout.
        factors: Its undamped factors.

    Returns:
        The same shapes, in the precision of the factors.

    Reference: (B ⊗ A) vec(V) = vec(A V Bᵀ), Martens & Grosse (2015), Sec. 4.2.
    """
    dtype = factors.gradient.values.dtype
    weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    product = weight.clone(memory_format=torch.preserve_format)
    bias_product = from_blocks(_block_product(to_blocks(weight, bias, layout), factors), layout, product)
    if bias is not None and layout.bias is BiasBlock.SEPARATE:
        columns = factors.gradient.matmul(_bias_blocks(bias, layout))  # [g · P, p, 1]; its activation factor is 1
        bias_product = _merged_bias(columns, layout)  # [g, out]
    scaled_bias = None if bias is None or bias_product is None else factors.scale * bias_product.reshape(bias.shape)
    return product.mul_(factors.scale), scaled_bias  # the bias is [out]


def quadratic_form(weight: Tensor, bias: Tensor | None, layout: BlockLayout, factors: LayerFactors) -> Tensor:
    """Return vᵀ (scale · Ḡ ⊗ Ā) v, with the layer's undamped Fisher block, for a vector v of its parameters.

    Args:
        weight: Entries of v for the weight, ``[out, in, kh, kw]`` or ``[out, in]``.
        bias: Entries of v for the bias, ``[out]``; ``None`` where the layer has no trainable bias.
        layout: The layer's block layout.
        factors: Its undamped factors.

    Returns:
        A 0-d tensor, on the device.

    Reference: the quadratic model of Martens & Grosse (2015), Sec. 6.4, with K-FAC's factors in place of the exact F.
    """
    dtype = factors.gradient.values.dtype
    bias = None if bias is None else bias.to(dtype)
    blocks = to_blocks(weight.to(dtype), bias, layout)  # [g, P, p, t, Q, d]
    total = (blocks * _block_product(blocks, factors)).sum()
    if bias is not None and layout.bias is BiasBlock.SEPARATE:
        columns = _bias_blocks(bias, layout)  # [g · P, p, 1]; the bias's activation factor is 1
        total = total + (columns * factors.gradient.matmul(columns)).sum()
    return factors.scale * total


def _block_product(blocks: Tensor, factors: LayerFactors) -> Tensor:
    """Multiply ``[g, P, p, t, Q, d]`` by both factors, block by block."""
    g, num_p, p, t, num_q, d = blocks.shape
    # [g · P, p, t · Q · d] and back, then [g · Q, d, P · p · t] and back. The reshaped tensors
    # have no names, so that copies are freed at once.
    left = factors.gradient.matmul(blocks.reshape(g * num_p, p, t * num_q * d)).view(blocks.shape)
    return weight_view(factors.activation.matmul(activation_view(left).mT).mT, blocks.shape)


def stacked_blocks(weights: Tensor, biases: Tensor | None, layout: BlockLayout) -> Tensor:
    """Return many vectors of a layer's parameters as ``[n, g, P, p, t, Q, d]``; see :func:`coordinates`."""
    if biases is None:
        return torch.vmap(lambda weight: to_blocks(weight, None, layout))(weights)
    return torch.vmap(lambda weight, bias: to_blocks(weight, bias, layout))(weights, biases)


def coordinates(
    weights: Tensor, biases: Tensor | None, layout: BlockLayout, gradient_vectors: Tensor, activation_vectors: Tensor
) -> Tensor:
    """Return vectors of a layer's parameters in the eigenbasis U_G ⊗ U_A of a Kronecker product, Qᵀv for each.

    Args:
        weights: Entries for the weight, ``[n, out, in, kh, kw]`` or ``[n, out, in]``.
        biases: Entries for the bias, ``[n, out]``; ``None`` where the layer has no trainable bias.
        layout: The layer's block layout.
        gradient_vectors: Eigenvectors of the gradient factor's blocks in columns, ``[g · P, p, p]``.
        activation_vectors: Eigenvectors of the activation factor's blocks in columns, ``[g · Q, d, d]``.

    Returns:
        ``[n, g · P · p · t · Q · d]``, and a separate bias's ``g · P · p`` after them, in which the products of
        eigenvalues are ordered alike. Channels that fill a last group have coordinates of their own.

    Reference: the Kronecker-factored eigenbasis, George et al. (2018), Sec. 3.
    """
    blocks = stacked_blocks(weights, biases, layout)
    n, g, num_p, p, t, num_q, d = blocks.shape
    by_gradient = blocks.permute(1, 2, 3, 0, 4, 5, 6).reshape(
        g * num_p, p, n * t * num_q * d
    )  # of [g, P, p, n, t, Q, d]
    blocks = torch.bmm(gradient_vectors.mT, by_gradient).view(g, num_p, p, n, t, num_q, d)
    by_activation = blocks.permute(0, 5, 3, 1, 2, 4, 6).reshape(g * num_q, n * num_p * p * t, d)
    blocks = torch.bmm(by_activation, activation_vectors).view(g, num_q, n, num_p, p, t, d)
    rotated = blocks.permute(2, 0, 3, 4, 5, 1, 6).reshape(n, -1)  # [n, g · P · p · t · Q · d]
    if biases is None or layout.bias is not BiasBlock.SEPARATE:
        return rotated
    columns = torch.vmap(lambda bias: _bias_blocks(bias, layout))(biases)  # [n, g · P, p, 1]
    return torch.cat([rotated, torch.matmul(gradient_vectors.mT, columns).flatten(1)], dim=1)  # [n, coordinates]


def _bias_blocks(bias_grad: Tensor, layout: BlockLayout) -> Tensor:
    """Return the gradient of a separate bias, ``[out]``, as ``[g · P, p, 1]``."""
    split = layout.gradient.split(bias_grad.view(layout.conv_groups, -1))  # [g, P, p]
    return split.flatten(0, 1).unsqueeze(-1)  # [g · P, p, 1]


def _merged_bias(columns: Tensor, layout: BlockLayout) -> Tensor:
    """Undo :func:`_bias_blocks`: return ``[g · P, p, 1]`` as ``[g, out]``."""
    split = columns.view(layout.conv_groups, layout.gradient.count, -1)  # [g, P, p]
    return layout.gradient.merge(split)  # [g, out]


def to_blocks(weight_grad: Tensor, bias_grad: Tensor | None, layout: BlockLayout) -> Tensor:
    """Return the gradient as ``[g, P, p, t, Q, d]``, without a copy where its memory format allows (channels_last)."""
    values = weight_grad.permute(0, 2, 3, 1) if weight_grad.dim() == 4 else weight_grad  # [out, kh, kw, in], [out, in]
    if layout.is_order_of_weights:  # one view instead of all below, as each takes the host's time at every step
        return values.reshape(layout.weight_shape)  # [g, P, p, t, Q, d]
    values = values.reshape(len(values), layout.num_taps, -1)  # [out, taps, in]
    values = layout.activation.split(values)  # [out, taps, Q, a]
    if layout.taps_in_features:
        values = values.transpose(1, 2).flatten(2).unsqueeze(1)  # [out, 1, Q, taps · a]
    if layout.bias is BiasBlock.JOINT:  # Q = 1; zeros for a bias that was frozen after the layout was made
        column = values.new_zeros(len(values)) if bias_grad is None else bias_grad
        values = torch.cat([values, column[:, None, None, None]], dim=-1)  # [out, 1, 1, taps · a + 1]
    groups = layout.gradient
    values = values.unflatten(0, (layout.conv_groups, groups.num_channels))  # [g, out, t, Q, d]
    if groups.num_padded:
        values = F.pad(values, (0, 0, 0, 0, 0, 0, 0, groups.num_padded))  # [g, P · p, t, Q, d]
    return values.unflatten(1, (groups.count, groups.size))  # [g, P, p, t, Q, d]


def from_blocks(blocks: Tensor, layout: BlockLayout, weight_grad: Tensor) -> Tensor | None:
    """Write ``[g, P, p, t, Q, d]`` back into the weight gradient, and return the joint bias, if there is one."""
    values = blocks.flatten(1, 2)[:, : layout.gradient.num_channels].flatten(0, 1)  # [out, t, Q, d]
    bias = None
    if layout.bias is BiasBlock.JOINT:
        bias, values = values[..., -1], values[..., :-1]  # [out, 1, 1], [out, 1, 1, taps · a]
    if layout.taps_in_features:
        values = values.squeeze(1).unflatten(-1, (layout.num_taps, -1)).transpose(1, 2)  # [out, taps, Q, a]
    target = weight_grad if weight_grad.dim() == 4 else weight_grad[:, :, None, None]  # [out, in, kh, kw]
    target = target.permute(0, 2, 3, 1)  # [out, kh, kw, in]
    if layout.activation.num_padded:
        values = layout.activation.merge(values)  # [out, taps, in]
    else:
        target = layout.activation.split(target)  # [out, kh, kw, Q, a]; a view, where merging would be a copy
    target.copy_(values.unflatten(1, target.shape[1:3]))  # [out, kh, kw, in] or [out, kh, kw, Q, a]
    return bias
