"""Second moments of layer inputs and output gradients, as rows.

h is an input, δ the gradient of the *un-averaged* per-example loss at an output; there are N examples, S output
locations and T taps. The Kronecker product approximates the mean per-example Fisher block of the weight gradient in the
order ``[out, taps, in]`` (PyTorch's ``channels_last`` order of a weight), where K-FAC is
``kron(gradient_factor, activation_factor)`` and SUA ``kron(gradient_factor, I_T, channel_factor)``.

- ``expand``: S · Ā ⊗ Ḡ, with Ā = mean over n, s of h hᵀ and Ḡ = mean over n, s of δ δᵀ (Grosse & Martens 2016).
- ``reduce``: E[h̄ h̄ᵀ] ⊗ E[δ̄ δ̄ᵀ], with h̄ the mean and δ̄ the sum over locations (Laurent et al. 2018, eq. 1).

Every function returns rows U, ``[blocks, rows, d]``; the Gram matrix UᵀU is the block before it is normalised.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from kfac_sua.preconditioner.forms.unfold import cached_pixel_weights, output_size, pad, patches, split_channels
from kfac_sua.preconditioner.geometry import BiasBlock, BlockLayout, LayerGeometry

MAX_PATCH_ELEMENTS = 2**25
"""Numbers in the patches formed at once: 128 MiB in float32, so that patches of a large batch do not fill the device; a
larger batch is taken in chunks of examples."""


def gradient_rows(output_grads: Tensor, layout: BlockLayout, *, reduce: bool) -> Tensor:
    """Return δ of every example and location, or their sums over locations: the rows of the gradient factor.

    Args:
        output_grads: ``[n, h', w', conv_groups · out_channels]``.
        layout: The layer's block layout.
        reduce: Sum over locations.

    Returns:
        ``[conv_groups · P, n · h' · w', p]``, or ``[conv_groups · P, n, p]`` under ``reduce``.

    Reference: Ḡ of Grosse & Martens (2016) under ``expand``, E[δ̄ δ̄ᵀ] of Laurent et al. (2018), eq. 1, under
    ``reduce``.
    """
    grads = output_grads.flatten(1, 2)  # [n, locations, channels]
    grads = grads.sum(1) if reduce else grads.flatten(0, 1)  # [rows, channels]
    return split_channels(grads.unsqueeze(1), layout.conv_groups, layout.gradient)  # [blocks, rows, p]


def num_activation_rows(inputs: Tensor, geometry: LayerGeometry, layout: BlockLayout) -> int:
    """Return how many rows :func:`activation_rows` yields.

    Args:
        inputs: ``[n, h, w, channels]``.
        geometry: The layer's geometry.
        layout: The layer's block layout.
    """
    num_examples, height, width, _ = inputs.shape
    if layout.taps_in_features:
        height, width = output_size(geometry, height, width)
    elif geometry.padding_mode != "zeros":
        left, right, top, bottom = geometry.padding
        height, width = height + top + bottom, width + left + right
    return num_examples * height * width


def activation_rows(inputs: Tensor, geometry: LayerGeometry, layout: BlockLayout) -> Iterator[Tensor]:
    """Yield the rows of the activation factor under ``expand``, in chunks of examples.

    For K-FAC a row is the patch read at one output location; for SUA it is a pixel, see :func:`exact_sua_rows`.

    Args:
        inputs: ``[n, h, w, conv_groups · in_channels]``.
        geometry: The layer's geometry.
        layout: The layer's block layout.

    Yields:
        ``[conv_groups · Q, rows, d]``.

    Reference: Ā of Grosse & Martens (2016), K-FAC for convolutions; C of :func:`exact_sua_rows`.
    """
    if not layout.taps_in_features:
        yield exact_sua_rows(inputs, geometry, layout)
        return
    if geometry.num_taps == 1 and not any(geometry.padding):  # a patch is a pixel: fewer views
        vertical, horizontal = geometry.stride
        windows = inputs[:, ::vertical, ::horizontal, None, None]  # [n, h', w', 1, 1, channels]
    else:
        windows = patches(pad(inputs, geometry), geometry)  # [n, h', w', kh, kw, channels], a view
    per_example = windows[:1].numel()
    for chunk in windows.split(max(1, MAX_PATCH_ELEMENTS // max(1, per_example))):  # as windows
        yield _patch_rows(chunk.flatten(0, 2), layout)  # from [rows, kh, kw, channels]


def exact_sua_rows(inputs: Tensor, geometry: LayerGeometry, layout: BlockLayout) -> Tensor:
    """Return √w_p x_p for every input pixel x_p: rows whose Gram matrix is the exact SUA factor times T · S · N.

    SUA takes the taps of a kernel as uncorrelated, with one covariance C of the channels: Ā ≈ I_T ⊗ C. The best such
    approximation in the Frobenius norm, argmin_C ‖Ā − I_T ⊗ C‖, is the mean of Ā's T diagonal blocks, one per tap,

        C = 1/(T S N) · Σ_{n,s,t} x_{n,s+t} x_{n,s+t}ᵀ = 1/(T S N) · Σ_{n,p} w_p x_{n,p} x_{n,p}ᵀ

    where x_{n,s+t} is the pixel that the tap t reads at the location s, and w_p counts the (s, t) pairs that read the
    pixel p. The weights w_p follow from the geometry alone, so that C is exact for every stride, padding and dilation
    and no patch is formed. The author's code takes the mean of x xᵀ over all pixels instead; the two agree where all
    pixels are read equally often and no tap reads padding.

    Args:
        inputs: ``[n, h, w, conv_groups · in_channels]``.
        geometry: The layer's geometry.
        layout: The layer's block layout, with the taps under the identity factor.

    Returns:
        ``[conv_groups · Q, n · h · w, d]``. Pixels of a zero padding add nothing to C and are left out; under the other
        padding modes h and w are those of the padded input.

    Reference: I ⊗ C of Laurent et al. (2018), Sec. 2.1; the name is from Grosse & Martens (2016). The projection with
    its weights w_p is this project's (``docs/mathematics.md``).
    """
    if geometry.padding_mode != "zeros":
        inputs = pad(inputs, geometry)
    height, width = inputs.shape[1:3]
    weights = cached_pixel_weights(geometry, height, width, inputs.device, inputs.dtype)  # √w_p, [h, w, 1]
    pixels = (inputs * weights).flatten(0, 2)  # [n · h · w, channels]
    return split_channels(pixels.unsqueeze(1), layout.conv_groups, layout.activation)  # [blocks, n · h · w, d]


def sampled_activation_rows(
    inputs: Tensor, geometry: LayerGeometry, layout: BlockLayout, most: int
) -> Iterator[Tensor]:
    """Yield at most ``most`` of the rows of :func:`activation_rows`, scaled so that the expected moment is the same.

    This is an approximation. The rows are spread evenly over examples and locations: one from each of ``most`` equal
    stretches. Within stretch i it lies at the fractional part of i/φ, φ the golden ratio, so that no regular pattern of
    locations is favoured.

    Args:
        inputs: ``[n, h, w, conv_groups · in_channels]``.
        geometry: The layer's geometry.
        layout: The layer's block layout.
        most: Rows to take.

    Yields:
        ``[conv_groups · Q, rows, d]``.

    Reference: this project's.
    """
    if not layout.taps_in_features:
        rows = exact_sua_rows(inputs, geometry, layout)  # [blocks, pixels, d]
        chosen = _spread(rows.shape[1], most, inputs.device)
        yield rows[:, chosen] * (rows.shape[1] / len(chosen)) ** 0.5
        return
    windows = patches(pad(inputs, geometry), geometry)  # [n, h', w', kh, kw, channels], a view
    height, width = windows.shape[1:3]
    total = windows.shape[:3].numel()
    chosen = _spread(total, most, inputs.device)
    example, y, x = chosen // (height * width), chosen // width % height, chosen % width
    sampled = windows[example, y, x]  # [rows, kh, kw, channels]
    yield _patch_rows(sampled, layout) * (total / len(chosen)) ** 0.5


def reduced_activation_rows(inputs: Tensor, geometry: LayerGeometry, layout: BlockLayout) -> Tensor:
    """Return the rows of the activation factor under ``reduce``: patches summed over locations.

    Args:
        inputs: ``[n, h, w, conv_groups · in_channels]``.
        geometry: The layer's geometry.
        layout: The layer's block layout.

    Returns:
        K-FAC: ``[conv_groups · Q, n, d]``. SUA: ``[conv_groups · Q, n · taps, d]``, a row per example and tap.

    Reference: Laurent et al. (2018), eq. 1: the sum over all pairs (s, s′) of h_s h_s′ᵀ is (Σ_s h_s)(Σ_s h_s)ᵀ; the
    ``reduce`` setting of Eschenhagen et al. (2023).
    """
    windows = patches(pad(inputs, geometry), geometry)  # [n, h', w', kh, kw, channels]
    num_locations = windows.shape[1] * windows.shape[2]
    summed = windows.sum((1, 2)).flatten(1, 2)  # [n, taps, channels]
    if not layout.taps_in_features:
        summed = summed.flatten(0, 1).unsqueeze(1)  # [n · taps, 1, channels]
    rows = split_channels(summed, layout.conv_groups, layout.activation)  # [blocks, rows, d]
    return _with_bias_coordinate(rows, layout, float(num_locations))


def _patch_rows(windows: Tensor, layout: BlockLayout) -> Tensor:
    """Return patches ``[rows, kh, kw, channels]`` as ``[conv_groups · Q, rows, d]``."""
    pixels = windows.flatten(1, 2)  # [rows, taps, channels]
    rows = split_channels(pixels, layout.conv_groups, layout.activation)  # [conv_groups · Q, rows, taps · channels]
    return _with_bias_coordinate(rows, layout, 1.0)


def _spread(total: int, most: int, device: torch.device) -> Tensor:
    """Return at most ``most`` of the integers below ``total``, in order: one from each of ``most`` equal stretches."""
    if total <= most:
        return torch.arange(total, device=device)
    stretch = torch.arange(most, device=device)
    start, stop = stretch * total // most, (stretch + 1) * total // most
    offset = torch.frac(stretch.double() * ((5**0.5 - 1) / 2))
    return start + (offset * (stop - start)).long()


def _with_bias_coordinate(rows: Tensor, layout: BlockLayout, value: float) -> Tensor:
    """Append a number to rows ``[blocks, rows, d − 1]`` where the bias is a coordinate of the activation factor."""
    if layout.bias is not BiasBlock.JOINT:
        return rows
    return F.pad(rows, (0, 1), value=value)  # [blocks, rows, d]
