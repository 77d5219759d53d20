"""Unfolding layer inputs: locations, padding, patches, read counts and channel groups. Views wherever possible."""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from kfac_sua.preconditioner.geometry import ChannelGroups, LayerGeometry

MAX_CACHED_SIZES = 256
"""Largest number of read counts in the cache, a few kB each: more than the pairs of convolution and image size in a
network."""


def to_locations(values: Tensor, geometry: LayerGeometry) -> Tensor:
    """Return layer inputs or output gradients with channels last, ``[examples, height, width, channels]``.

    Args:
        values: ``[n, c, h, w]`` or ``[c, h, w]`` for a convolution; ``[n, ..., features]`` or ``[features]`` for a
            linear layer, whose extra dimensions become locations.
        geometry: The layer's geometry.
    """
    if geometry.is_convolution:
        return (values if values.dim() == 4 else values.unsqueeze(0)).permute(0, 2, 3, 1)  # [n, h, w, c]
    values = values if values.dim() > 1 else values.unsqueeze(0)  # [n, ..., features]
    return values.reshape(values.shape[0], -1, 1, values.shape[-1])  # [n, locations, 1, features]


def pad(inputs: Tensor, geometry: LayerGeometry, *, vertical: bool = True) -> Tensor:
    """Pad inputs as the layer does.

    Args:
        inputs: ``[n, h, w, c]``.
        geometry: The layer's geometry.
        vertical: False for zeros on the left and on the right only.

    Returns:
        ``[n, padded h, padded w, c]``; the inputs themselves where there is nothing to pad.
    """
    left, right, top, bottom = geometry.padding
    if not vertical:
        return F.pad(inputs, (0, 0, left, right)) if left or right else inputs  # [n, h, padded w, c]
    if not any(geometry.padding):
        return inputs
    if geometry.padding_mode == "zeros":
        return F.pad(inputs, (0, 0, left, right, top, bottom))  # [n, padded h, padded w, c]
    channels_first = inputs.permute(0, 3, 1, 2)  # [n, c, h, w]
    padded = F.pad(channels_first, geometry.padding, mode=geometry.padding_mode)  # [n, c, padded h, padded w]
    return padded.permute(0, 2, 3, 1)  # [n, padded h, padded w, c]


def patches(padded: Tensor, geometry: LayerGeometry) -> Tensor:
    """View padded inputs as the patches that the kernel reads at every output location, without a copy.

    Args:
        padded: ``[n, h, w, c]``, as :func:`pad` returns.
        geometry: The layer's geometry.

    Returns:
        ``[n, h', w', kh, kw, c]``: what ``torch.nn.functional.unfold`` copies, channels last.

    Reference: the matrix ⟦A⟧ of Grosse & Martens (2016), with a row per example and location.
    """
    (kh, kw), (sh, sw), (dh, dw) = geometry.kernel_size, geometry.stride, geometry.dilation
    windows = padded.unfold(1, dh * (kh - 1) + 1, sh).unfold(2, dw * (kw - 1) + 1, sw)  # [n, h', w', c, ..., ...]
    return windows[..., ::dh, ::dw].permute(0, 1, 2, 4, 5, 3)  # [n, h', w', kh, kw, c]


def read_counts(size: int, kernel_size: int, stride: int, dilation: int) -> Tensor:
    """Return how many (location, tap) pairs read each position of a padded axis: ``fold(ones)`` in one dimension.

    Args:
        size: Length of the padded axis, in pixels.
        kernel_size: Taps along the axis.
        stride: Stride along the axis.
        dilation: Dilation along the axis.

    Returns:
        Integer counts, ``[size]``.

    Reference: this project's; the factors of w_p in :func:`pixel_read_counts`.
    """
    reads = stride * torch.arange(_num_outputs(size, kernel_size, stride, dilation))[:, None]  # [locations, 1]
    reads = reads + dilation * torch.arange(kernel_size)  # [locations, taps]
    return torch.bincount(reads.flatten(), minlength=size)  # [size]


def pixel_read_counts(geometry: LayerGeometry, height: int, width: int) -> Tensor:
    """Return how many (location, tap) pairs read each pixel of an input, ``[height, width]``.

    Args:
        geometry: The layer's geometry.
        height: Height of the input, without padding if the padding is zeros, with it in all other modes.
        width: Width of the input, as the height.

    Returns:
        Integer counts w_p, the product of a vertical and a horizontal count.

    Reference: this project's; the weights of :func:`~kfac_sua.preconditioner.forms.moments.exact_sua_rows`.
    """
    left, right, top, bottom = geometry.padding if geometry.padding_mode == "zeros" else (0, 0, 0, 0)
    (kh, kw), (sh, sw), (dh, dw) = geometry.kernel_size, geometry.stride, geometry.dilation
    vertical = read_counts(height + top + bottom, kh, sh, dh)[top : top + height]  # [height]
    horizontal = read_counts(width + left + right, kw, sw, dw)[left : left + width]  # [width]
    return torch.outer(vertical, horizontal)  # [height, width]


@lru_cache(maxsize=MAX_CACHED_SIZES)
def cached_read_counts(
    geometry: LayerGeometry, height: int, width: int, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Return :func:`pixel_read_counts` on a device; cached, as a copy to the device makes the host wait."""
    return pixel_read_counts(geometry, height, width).to(device, dtype)


@lru_cache(maxsize=MAX_CACHED_SIZES)
def cached_pixel_weights(
    geometry: LayerGeometry, height: int, width: int, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Return √w_p on a device, ``[height, width, 1]``, with w_p as :func:`pixel_read_counts` returns it."""
    return cached_read_counts(geometry, height, width, device, dtype).sqrt().unsqueeze(-1)  # [height, width, 1]


def output_size(geometry: LayerGeometry, height: int, width: int) -> tuple[int, int]:
    """Return height and width of a layer's output, in pixels.

    Args:
        geometry: The layer's geometry.
        height: Height of the input, without padding.
        width: Width of the input, as the height.
    """
    left, right, top, bottom = geometry.padding
    (kh, kw), (sh, sw), (dh, dw) = geometry.kernel_size, geometry.stride, geometry.dilation
    return _num_outputs(height + top + bottom, kh, sh, dh), _num_outputs(width + left + right, kw, sw, dw)


def split_channels(values: Tensor, conv_groups: int, groups: ChannelGroups) -> Tensor:
    """Split the channels of rows into blocks, one per convolution group and channel group.

    Args:
        values: ``[rows, taps, conv_groups · channels]``.
        conv_groups: Groups of the convolution.
        groups: Channel groups of each of them; a ragged last one is padded with zeros.

    Returns:
        ``[conv_groups · count, rows, taps · size]``.

    Reference: channel groups: Laurent et al. (2018), Sec. 2.2.
    """
    num_rows, taps, channels = values.shape
    if taps == 1 and not groups.num_padded:  # fewer views, as each takes the host's time
        blocks = values.reshape(num_rows, conv_groups * groups.count, groups.size)  # [rows, g · count, size]
        if channels > groups.size:
            return blocks.transpose(0, 1)  # [g · count, rows, size]
        return blocks.reshape(1, num_rows, channels)  # [1, rows, size], as there is one block
    split = groups.split(values.unflatten(-1, (conv_groups, groups.num_channels)))  # [rows, taps, g, count, size]
    return split.permute(2, 3, 0, 1, 4).flatten(3).flatten(0, 1)  # [g · count, rows, taps · size]


def _num_outputs(size: int, kernel_size: int, stride: int, dilation: int) -> int:
    """Return how many outputs a convolution has along an axis, whose padded size is given."""
    return (size - dilation * (kernel_size - 1) - 1) // stride + 1
