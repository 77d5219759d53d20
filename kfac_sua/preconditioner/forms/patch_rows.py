"""The patches of a mini-batch as an operator: products with them, without forming them.

The rows U of K-FAC's activation factor are patches: T pixels side by side, each pixel in up to T patches, and zeros
where the kernel reaches over the border. All that the Woodbury identity needs of U are products, and each is a sum over
taps of products with the pixels themselves: U Uᵀ, V Uᵀ, Z U and U M. On small maps the border saves much: of the 36
(location, tap) pairs of a 3×3 kernel on a 2×2 map, 16 read a pixel. Memory is that of the pixels, 1/T of U's.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kfac_sua.preconditioner.forms import unfold
from kfac_sua.preconditioner.geometry import BlockLayout, ChannelGroups, LayerGeometry

_Line = tuple[int, slice]
"""A row, and the columns in it."""


@dataclass(frozen=True)
class _Read:
    """Which output rows or columns a tap reads from which pixels, along one axis."""

    tap: int
    outputs: slice
    pixels: slice


def can_be_patch_rows(geometry: LayerGeometry, layout: BlockLayout) -> bool:
    """Whether the rows of a layer's activation factor are patches and nothing else, in one block."""
    return (
        layout.taps_in_features
        and geometry.num_taps > 1
        and geometry.padding_mode == "zeros"
        and layout.activation_blocks == (1, geometry.in_channels * geometry.num_taps)
    )


def product_width(geometry: LayerGeometry) -> int:
    """Return the width of the products that give the Gram matrix between patches, in FLOPs per pair of patches.

    That of the pixels, channels; of the patches formed where strides leave fewer of these (see ``PatchRows.cross``).
    """
    return geometry.in_channels if geometry.stride == (1, 1) else geometry.in_channels * geometry.num_taps


@dataclass(frozen=True)
class PatchRows:
    """Patches of one convolution without groups; a row per output location and example, in the order (y, x, n).

    Args:
        pixels: What the patches are read from, without padding, ``[h, w, n, channels]``.
        geometry: The layer's geometry; see :func:`can_be_patch_rows`.
    """

    pixels: Tensor
    geometry: LayerGeometry

    @classmethod
    def read(cls, inputs: Tensor, geometry: LayerGeometry) -> "PatchRows":
        """Copy the pixels of inputs ``[n, h, w, channels]``."""
        pixels = inputs.permute(1, 2, 0, 3)  # [h, w, n, channels]
        return cls(pixels.clone(memory_format=torch.contiguous_format), geometry)

    @property
    def output_size(self) -> tuple[int, int]:
        """Height and width of the layer's output."""
        return unfold.output_size(self.geometry, *self.pixels.shape[:2])

    @property
    def num_rows(self) -> int:
        """Number of patches."""
        height, width = self.output_size
        return height * width * self.pixels.shape[2]

    @property
    def read_share(self) -> float:
        """Share of the (location, tap) pairs that read a pixel; the others read the zeros of the padding."""
        shares = []
        for reads, size, taps in zip(
            (self._vertical_reads(), self._horizontal_reads()),
            self.output_size,
            self.geometry.kernel_size,
            strict=True,
        ):
            shares.append(sum(read.outputs.stop - read.outputs.start for read in reads) / (size * taps))
        return math.prod(shares)

    def scaled(self, factor: float) -> "PatchRows":
        """Return the patches times a number."""
        return PatchRows(self.pixels * factor, self.geometry)

    def double(self) -> "PatchRows":
        """Return the patches in float64."""
        return PatchRows(self.pixels.double(), self.geometry)

    def trace(self) -> Tensor:
        """Return tr(UᵀU), the sum of squares over all patches, as a 0-d tensor."""
        height, width = self.pixels.shape[:2]
        counts = unfold.cached_read_counts(self.geometry, height, width, self.pixels.device, self.pixels.dtype)
        return (self.pixels.square().sum((2, 3)) * counts).sum()

    def rows(self) -> Tensor:
        """Return U, formed: ``[rows, taps · channels]``, a new tensor."""
        padded = unfold.pad(self.pixels.permute(2, 0, 1, 3), self.geometry)  # [n, h, w, channels]
        windows = unfold.patches(padded, self.geometry).permute(1, 2, 0, 3, 4, 5)  # [h', w', n, kh, kw, channels]
        formed = windows.clone(memory_format=torch.contiguous_format)
        return formed.flatten(0, 2).flatten(1)  # [rows, taps · channels]

    def blocks(self, groups: ChannelGroups) -> Tensor:
        """Return U, formed, split into channel groups: ``[Q, rows, taps · size]``."""
        rows = self.rows().unflatten(1, (self.geometry.num_taps, -1))  # [rows, taps, channels]
        return unfold.split_channels(rows, 1, groups)

    def gram(self) -> Tensor:
        """Return U Uᵀ, ``[rows, rows]``."""
        return self.cross(self)

    def cross(self, other: "PatchRows") -> Tensor:
        """Return U Wᵀ, with W the patches of another mini-batch of images of the same size.

        Products of all pixels, added up over taps; of the patches formed, where strides leave fewer of these.

        Args:
            other: W.

        Returns:
            ``[rows of U, rows of W]``.
        """
        sizes = [*self.pixels.shape[:3], *other.pixels.shape[:3]]
        if math.prod(sizes) > self.geometry.num_taps * self.num_rows * other.num_rows:
            return self.rows() @ other.rows().mT  # [rows of U, rows of W]
        flat, other_flat = self.pixels.flatten(0, 2), other.pixels.flatten(0, 2)  # [h · w · n, channels]
        products = (flat @ other_flat.mT).view(sizes)  # [h, w, n, h, w, n of W]
        height, width = self.output_size
        total = self.pixels.new_zeros(height, width, sizes[2], height, width, sizes[5])  # [h', w', n, h', w', n of W]
        for rows in self._vertical_reads():
            for columns in self._horizontal_reads():
                read = products[rows.pixels, columns.pixels, :, rows.pixels, columns.pixels]
                total[rows.outputs, columns.outputs, :, rows.outputs, columns.outputs] += read
        return total.flatten(3).flatten(0, 2)  # [rows of U, rows of W]

    def multiply(self, matrices: Tensor, groups: ChannelGroups) -> Tensor:
        """Return U times a matrix per channel group.

        Args:
            matrices: ``[Q, taps · size, d]``.
            groups: The channel groups.

        Returns:
            ``[Q, rows, d]``.
        """
        pixels = groups.split(self.pixels).permute(3, 0, 1, 2, 4)  # [Q, h, w, n, size]
        taps = matrices.unflatten(1, (*self.geometry.kernel_size, -1))  # [Q, kh, kw, size, d]
        product = matrices.new_zeros(len(matrices), *self.output_size, self.pixels.shape[2], matrices.shape[-1])
        for y, x, outputs, read in self.reads():
            target = product[:, *outputs].flatten(1, 2)  # [Q, columns · n, d]
            target.baddbmm_(pixels[:, *read].flatten(1, 2), taps[:, y, x])  # of [Q, columns · n, size] and [Q, size, d]
        return product.flatten(1, 3)  # [Q, rows, d]

    def times(self, values: Tensor) -> Tensor:
        """Return V Uᵀ.

        Args:
            values: V, ``[m, taps · channels]``.

        Returns:
            ``[m, rows]``.
        """
        taps = values.unflatten(1, (*self.geometry.kernel_size, -1))  # [m, kh, kw, channels]
        out_height, out_width = self.output_size
        product = values.new_zeros(len(values), out_height, out_width, self.pixels.shape[2])
        for y, x, outputs, pixels in self.reads():
            line = self.pixels[pixels].flatten(0, 1)  # [columns · n, channels]
            product[:, *outputs].flatten(1).addmm_(taps[:, y, x], line.mT)  # [m, columns · n]
        return product.flatten(1)  # [m, rows]

    def subtract_combination_(self, values: Tensor, coefficients: Tensor) -> Tensor:
        """Subtract Z U from values, in place, and return them.

        Args:
            values: ``[m, taps · channels]``, contiguous.
            coefficients: Z, ``[m, rows]``.
        """
        taps = values.view(len(values), *self.geometry.kernel_size, -1)  # [m, kh, kw, channels]
        locations = coefficients.unflatten(1, (*self.output_size, -1))  # [m, h', w', n]
        for y, x, outputs, read in self.reads():
            lines = self.pixels[read].flatten(0, 1)  # [columns · n, channels]
            taps[:, y, x].addmm_(locations[:, *outputs].flatten(1), lines, alpha=-1)  # of [m, columns · n]
        return values

    def reads(self) -> Iterator[tuple[int, int, _Line, _Line]]:
        """Yield a tap's row and column, a line of outputs, and the line of pixels that they read through it."""
        for rows in self._vertical_reads():
            output_rows = range(rows.outputs.start, rows.outputs.stop)
            pixel_rows = range(rows.pixels.start, rows.pixels.stop, rows.pixels.step)
            for output_row, pixel_row in zip(output_rows, pixel_rows, strict=True):
                for columns in self._horizontal_reads():
                    yield rows.tap, columns.tap, (output_row, columns.outputs), (pixel_row, columns.pixels)

    def _vertical_reads(self) -> Iterator[_Read]:
        return _axis_reads(self.geometry, 0, self.pixels.shape[0], self.output_size[0])

    def _horizontal_reads(self) -> Iterator[_Read]:
        return _axis_reads(self.geometry, 1, self.pixels.shape[1], self.output_size[1])


def joined(parts: list[PatchRows]) -> PatchRows:
    """Return the patches of several mini-batches of images of one size as those of one."""
    if len(parts) == 1:
        return parts[0]
    return PatchRows(torch.cat([part.pixels for part in parts], dim=2), parts[0].geometry)


def _axis_reads(geometry: LayerGeometry, axis: int, size: int, num_outputs: int) -> Iterator[_Read]:
    """Yield for every tap that reads a pixel at all: the outputs for which it does, and the pixels."""
    stride, step = geometry.stride[axis], geometry.dilation[axis]
    before = geometry.padding_before[axis]
    for tap in range(geometry.kernel_size[axis]):
        shift = tap * step - before  # output i reads pixel stride · i + shift
        first = max(0, -(shift // stride))
        last = min(num_outputs, (size - 1 - shift) // stride + 1)
        if first < last:
            start = stride * first + shift
            yield _Read(tap, slice(first, last), slice(start, start + stride * (last - first - 1) + 1, stride))
