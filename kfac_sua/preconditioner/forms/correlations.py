"""K-FAC's activation factor of a convolution from correlations between image lines, without forming patches.

The factor's block for the vertical taps (t, t′) is Σ_y F_{y+t} F_{y+t′}ᵀ, where F_r holds line r of the image with its
horizontal taps side by side and y runs over the lines of the output. Blocks with the same offset t′ − t are sums over
the same products, except for the lines at the border, which some taps read and others do not. So every product of two
lines is formed once and added to all the blocks that contain it: for a 3×3 kernel three products of width 3·channels
instead of one of width 9·channels, a third of the FLOPs and of the memory. This is exact for every kernel, padding and
dilation; the vertical stride must be 1.
"""

import itertools
from collections.abc import Iterator

from torch import Tensor

from kfac_sua.preconditioner.forms.dense import gram
from kfac_sua.preconditioner.forms.rates import DeviceRates
from kfac_sua.preconditioner.forms.unfold import pad, split_channels
from kfac_sua.preconditioner.geometry import BiasBlock, BlockLayout, LayerGeometry


def can_correlate(geometry: LayerGeometry, layout: BlockLayout) -> bool:
    """Whether the factor can be formed from correlations between lines, with fewer FLOPs than from patches."""
    return (
        layout.taps_in_features
        and layout.bias is not BiasBlock.JOINT
        and geometry.stride[0] == 1
        and geometry.kernel_size[0] > 1
    )


def is_worth_correlating(rows: int, geometry: LayerGeometry, layout: BlockLayout, rates: DeviceRates) -> bool:
    """Whether correlations take less time than forming patches: they take fewer FLOPs in more operations.

    Args:
        rows: Number of patches.
        geometry: The layer's geometry, for which :func:`can_correlate` holds.
        layout: Its block layout.
        rates: Those of the device.
    """
    num_blocks, width = layout.activation_blocks
    taps = geometry.kernel_size[0]
    saved = 2 * rows * num_blocks * width**2 * (1 - 1 / taps) / rates.product
    # Up to three products for every offset between vertical taps, and an addition or a mirror image for every pair.
    return saved > (3 * taps + taps**2) * rates.launch_s


def patch_moment(inputs: Tensor, geometry: LayerGeometry, layout: BlockLayout) -> Tensor:
    """Return Σ over examples and output locations of patch · patchᵀ, per channel group.

    Args:
        inputs: ``[n, h, w, conv_groups · in_channels]``.
        geometry: The layer's geometry, for which :func:`can_correlate` holds.
        layout: Its block layout.

    Returns:
        Symmetric blocks ``[conv_groups · Q, taps · channels, taps · channels]``, to be divided by N · S.

    Reference: Ā of Grosse & Martens (2016), K-FAC for convolutions; the sum over image lines is this project's way.
    """
    lines, top = _image_lines(inputs, geometry, layout)  # [blocks, h, n · w', kw · a]
    kernel_height, step = geometry.kernel_size[0], geometry.dilation[0]
    width = lines.shape[-1]
    # [blocks, kh, kw · a, kh, kw · a]
    moment = lines.new_zeros(lines.shape[0], kernel_height, width, kernel_height, width)
    for offset in range(kernel_height):
        for start, stop, taps in _shared_lines(lines.shape[1], top, offset, geometry):
            upper = lines[:, start:stop].flatten(1, 2)  # [blocks, lines · n · w', kw · a]
            lower = lines[:, start + offset * step : stop + offset * step].flatten(1, 2)  # as upper
            product = upper.mT @ lower if offset else gram(upper)  # [blocks, kw · a, kw · a]
            for tap in taps:
                moment[:, tap, :, tap + offset] += product
    for tap in range(kernel_height):
        for other in range(tap + 1, kernel_height):
            moment[:, other, :, tap] = moment[:, tap, :, other].mT  # [blocks, kw · a, kw · a]
    return moment.flatten(3).flatten(1, 2)  # [blocks, taps · a, taps · a]


def _image_lines(inputs: Tensor, geometry: LayerGeometry, layout: BlockLayout) -> tuple[Tensor, int]:
    """Return image lines with their horizontal taps, ``[blocks, h, n · w', kw · a]``, and how many are missing above.

    Lines of zeros above and below the image add nothing and are left out; those of other padding modes are included.
    """
    top = geometry.padding[2]
    if geometry.padding_mode == "zeros":
        inputs = pad(inputs, geometry, vertical=False)
    else:
        inputs, top = pad(inputs, geometry), 0
    taps, stride, step = geometry.kernel_size[1], geometry.stride[1], geometry.dilation[1]
    windows = inputs.unfold(2, step * (taps - 1) + 1, stride)[..., ::step]  # [n, h, w', channels, kw]
    windows = windows.permute(1, 0, 2, 4, 3).flatten(1, 2)  # [h, n · w', kw, channels]
    height, num = windows.shape[:2]
    lines = windows.flatten(0, 1)  # [h · n · w', kw, channels]
    blocks = split_channels(lines, layout.conv_groups, layout.activation)  # [blocks, h · n · w', kw · a]
    return blocks.unflatten(1, (height, num)), top  # [blocks, h, n · w', kw · a]


def _shared_lines(height: int, top: int, offset: int, geometry: LayerGeometry) -> Iterator[tuple[int, int, list[int]]]:
    """Yield ranges of image lines, each with the vertical taps t whose block (t, t + offset) sums over all of them."""
    taps, step = geometry.kernel_size[0], geometry.dilation[0]
    missing = top + geometry.padding[3] if geometry.padding_mode == "zeros" else 0  # lines of zeros above and below
    num_outputs = height + missing - step * (taps - 1)
    ranges = {
        tap: (max(0, tap * step - top), min(height - offset * step, tap * step - top + num_outputs))
        for tap in range(taps - offset)
    }
    borders = sorted({border for pair in ranges.values() for border in pair})
    for start, stop in itertools.pairwise(borders):
        members = [tap for tap, (first, last) in ranges.items() if first <= start and stop <= last]
        if members:
            yield start, stop, members
