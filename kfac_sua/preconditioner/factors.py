"""Second moments of layer inputs and output gradients, as rows and as blocks.

Conventions, once: h are inputs, δ gradients of the *un-averaged* per-example loss at the outputs, N examples, S output
locations, T taps. The Kronecker product approximates the mean per-example Fisher block of the weight gradient in the
order ``[out, taps, in]`` (PyTorch's ``channels_last`` order of a weight), where K-FAC is
``kron(gradient_factor, activation_factor)`` and SUA ``kron(gradient_factor, I_T, channel_factor)``.

- ``expand``: S · Ā ⊗ Ḡ, with Ā = mean over n, s of h hᵀ and Ḡ = mean over n, s of δ δᵀ (Grosse & Martens 2016).
- ``reduce``: E[h̄ h̄ᵀ] ⊗ E[δ̄ δ̄ᵀ], with h̄ the mean and δ̄ the sum over locations (Laurent et al. 2018, eq. 1).

Every function returns rows ``[blocks, rows, d]`` whose Gram matrix over rows is the un-normalised block.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from kfac_sua.preconditioner.grouping import BiasBlock, BlockLayout, ChannelGroups
from kfac_sua.preconditioner.layers import LayerGeometry

MAX_PATCH_ELEMENTS = 2**25
"""Patches formed at once (128 MiB in float32); larger batches are taken in chunks of examples."""


@dataclass
class Factor:
    """One side of a layer's Kronecker product, normalised: dense blocks, or rows whose Gram matrix they are.

    Args:
        blocks: Symmetric positive semi-definite, ``[num_blocks, d, d]``; ``None`` where ``rows`` are kept instead.
        rows: ``[num_blocks, rows, d]`` with ``blocks = rowsᵀ rows``; ``None`` where ``blocks`` is given.
    """

    blocks: Tensor | None = None
    rows: Tensor | None = None

    @property
    def values(self) -> Tensor:
        """Whichever of the two is kept."""
        values = self.blocks if self.blocks is not None else self.rows
        assert values is not None
        return values

    def traces(self) -> Tensor:
        """Trace of every block, ``[num_blocks]``."""
        if self.blocks is not None:
            return self.blocks.diagonal(dim1=-2, dim2=-1).sum(-1)
        return self.values.square().sum((-2, -1))

    def dense(self) -> Tensor:
        """Return the blocks, ``[num_blocks, d, d]``."""
        return self.blocks if self.blocks is not None else gram(self.values)


def gram(rows: Tensor) -> Tensor:
    """Return rowsᵀ rows of ``[blocks, rows, d]``, as ``[blocks, d, d]``."""
    return rows.mT @ rows


def to_locations(values: Tensor, geometry: LayerGeometry) -> Tensor:
    """Return layer inputs or output gradients with channels last, ``[examples, height, width, channels]``.

    Args:
        values: ``[n, c, h, w]`` or ``[c, h, w]`` for a convolution; ``[n, ..., features]`` or ``[features]`` for a
            linear layer, whose extra dimensions become locations.
        geometry: The layer's geometry.
    """
    if geometry.is_convolution:
        return (values if values.dim() == 4 else values.unsqueeze(0)).permute(0, 2, 3, 1)
    values = values if values.dim() > 1 else values.unsqueeze(0)
    return values.reshape(values.shape[0], -1, 1, values.shape[-1])


def gradient_rows(output_grads: Tensor, layout: BlockLayout, *, reduce: bool) -> Tensor:
    """Return the rows of the gradient factor.

    Args:
        output_grads: ``[n, h', w', conv_groups · out_channels]``.
        layout: The layer's block layout.
        reduce: Sum over locations first.

    Returns:
        ``[conv_groups · P, n · h' · w', p]``, or ``[conv_groups · P, n, p]`` under ``reduce``.
    """
    grads = output_grads.flatten(1, 2)  # [n, locations, channels]
    grads = grads.sum(1) if reduce else grads.flatten(0, 1)  # [rows, channels]
    return _channel_blocks(grads.unsqueeze(1), layout.conv_groups, layout.gradient)


def activation_rows(inputs: Tensor, geometry: LayerGeometry, layout: BlockLayout) -> Iterator[Tensor]:
    """Yield the rows of the activation factor under ``expand``, in chunks of examples.

    For K-FAC a row is the patch read at one output location. For SUA it is one input pixel x_p times √w_p, where w_p
    counts the (location, tap) pairs that read the pixel, so that the Gram matrix Σ_p w_p x_p x_pᵀ is the sum of the T
    diagonal tap blocks of K-FAC's: right for every stride, padding and dilation, without forming patches.

    Args:
        inputs: ``[n, h, w, conv_groups · in_channels]``.
        geometry: The layer's geometry.
        layout: The layer's block layout.

    Yields:
        ``[conv_groups · Q, rows, d]``.
    """
    if not layout.taps_in_features:
        yield _weighted_pixels(inputs, geometry, layout)
        return
    padded = _pad(inputs, geometry)
    height, width = _output_size(padded, geometry)
    per_example = height * width * layout.num_taps * padded.shape[-1]
    for chunk in padded.split(max(1, MAX_PATCH_ELEMENTS // max(1, per_example))):
        patches = _patches(chunk, geometry).flatten(0, 2).flatten(1, 2)  # [rows, taps, channels]
        yield _with_bias_coordinate(_channel_blocks(patches, layout.conv_groups, layout.activation), layout, 1.0)


def reduced_activation_rows(inputs: Tensor, geometry: LayerGeometry, layout: BlockLayout) -> Tensor:
    """Return the rows of the activation factor under ``reduce``: patches summed over locations.

    Returns:
        K-FAC: ``[conv_groups · Q, n, d]``. SUA: ``[conv_groups · Q, n · taps, d]``, a row per example and tap.
    """
    patches = _patches(_pad(inputs, geometry), geometry)  # [n, h', w', kh, kw, channels]
    num_locations = patches.shape[1] * patches.shape[2]
    summed = patches.sum((1, 2)).flatten(1, 2)  # [n, taps, channels]
    if not layout.taps_in_features:
        summed = summed.flatten(0, 1).unsqueeze(1)  # [n · taps, 1, channels]
    rows = _channel_blocks(summed, layout.conv_groups, layout.activation)
    return _with_bias_coordinate(rows, layout, float(num_locations))


def read_counts(size: int, kernel_size: int, stride: int, dilation: int) -> Tensor:
    """Return how many (location, tap) pairs read each position of a padded axis: ``fold(ones)`` in one dimension.

    Args:
        size: Length of the padded axis, in pixels.
        kernel_size: Taps along the axis.
        stride: Stride along the axis.
        dilation: Dilation along the axis.

    Returns:
        Integer counts, ``[size]``.
    """
    num_locations = (size - dilation * (kernel_size - 1) - 1) // stride + 1
    reads = stride * torch.arange(num_locations)[:, None] + dilation * torch.arange(kernel_size)  # [locations, taps]
    return torch.bincount(reads.flatten(), minlength=size)


def _weighted_pixels(inputs: Tensor, geometry: LayerGeometry, layout: BlockLayout) -> Tensor:
    if geometry.padding_mode != "zeros":
        inputs = _pad(inputs, geometry)
    weights = _root_read_counts(geometry, inputs.shape[1], inputs.shape[2], inputs.device, inputs.dtype)  # [h, w, 1]
    pixels = (inputs * weights).flatten(0, 2)  # [rows, channels]
    return _channel_blocks(pixels.unsqueeze(1), layout.conv_groups, layout.activation)


@lru_cache(maxsize=256)
def _root_read_counts(
    geometry: LayerGeometry, height: int, width: int, device: torch.device, dtype: torch.dtype
) -> Tensor:
    left, right, top, bottom = geometry.padding if geometry.padding_mode == "zeros" else (0, 0, 0, 0)
    (kh, kw), (sh, sw), (dh, dw) = geometry.kernel_size, geometry.stride, geometry.dilation
    rows = read_counts(height + top + bottom, kh, sh, dh)[top : top + height]
    columns = read_counts(width + left + right, kw, sw, dw)[left : left + width]
    return torch.outer(rows, columns).unsqueeze(-1).to(device, dtype).sqrt()


def _pad(inputs: Tensor, geometry: LayerGeometry) -> Tensor:
    """Pad ``[n, h, w, c]`` as the layer does."""
    if not any(geometry.padding):
        return inputs
    if geometry.padding_mode == "zeros":
        left, right, top, bottom = geometry.padding
        return F.pad(inputs, (0, 0, left, right, top, bottom))
    channels_first = inputs.permute(0, 3, 1, 2)
    return F.pad(channels_first, geometry.padding, mode=geometry.padding_mode).permute(0, 2, 3, 1)


def _patches(padded: Tensor, geometry: LayerGeometry) -> Tensor:
    """View padded inputs ``[n, h, w, c]`` as patches ``[n, h', w', kh, kw, c]`` without a copy."""
    (kh, kw), (sh, sw), (dh, dw) = geometry.kernel_size, geometry.stride, geometry.dilation
    windows = padded.unfold(1, dh * (kh - 1) + 1, sh).unfold(2, dw * (kw - 1) + 1, sw)  # [n, h', w', c, ..., ...]
    return windows[..., ::dh, ::dw].permute(0, 1, 2, 4, 5, 3)


def _output_size(padded: Tensor, geometry: LayerGeometry) -> tuple[int, int]:
    (kh, kw), (sh, sw), (dh, dw) = geometry.kernel_size, geometry.stride, geometry.dilation
    return (padded.shape[1] - dh * (kh - 1) - 1) // sh + 1, (padded.shape[2] - dw * (kw - 1) - 1) // sw + 1


def _channel_blocks(values: Tensor, conv_groups: int, groups: ChannelGroups) -> Tensor:
    """Split ``[rows, taps, conv_groups · channels]`` into ``[conv_groups · count, rows, taps · size]``."""
    split = groups.split(values.unflatten(-1, (conv_groups, groups.num_channels)))  # [rows, taps, g, count, size]
    return split.permute(2, 3, 0, 1, 4).flatten(3).flatten(0, 1)


def _with_bias_coordinate(rows: Tensor, layout: BlockLayout, value: float) -> Tensor:
    if layout.bias is not BiasBlock.JOINT:
        return rows
    return F.pad(rows, (0, 1), value=value)
