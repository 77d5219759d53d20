"""The patches of a mini-batch as an operator: products with patches that are not formed.

The rows U of K-FAC's activation factor are patches: T pixels side by side, each pixel in up to T patches, and zeros
where the kernel reaches over the border. The Woodbury identity needs only products with U: U Uᵀ, V Uᵀ, Z U and U M.
Each is a sum over taps of products with the pixels themselves. On small maps this leaves out many zeros: of the 36
(location, tap) pairs of a 3×3 kernel on a 2×2 map, 16 read a pixel. The pixels take 1/T of the memory of U.

U is the matrix ⟦A⟧ of Grosse & Martens (2016), who form it; not to form it is this project's way. A *line*
is a row of pixels of the image, so that *row* always means a row of U.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kfac_sua.preconditioner.forms import unfold
from kfac_sua.preconditioner.geometry import BlockLayout, ChannelGroups, LayerGeometry

_Line = tuple[int, slice]
"""Part of a line of an image: its vertical index, and its horizontal indices."""


@dataclass(frozen=True)
class _Read:
    """The outputs for which a tap reads a pixel, and these pixels, along one axis."""

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
    """Return the width of the products that U Uᵀ takes, in multiply-adds per pair of patches.

    The channels, for products of pixels; taps · channels where strides leave fewer patches than pixels, so that these
    are formed (see :meth:`PatchRows.cross`).
    """
    return geometry.in_channels if geometry.stride == (1, 1) else geometry.in_channels * geometry.num_taps


@dataclass(frozen=True)
class PatchRows:
    """Patches of one convolution without groups; a row per output location and example, in the order (y, x, n).

    Reference: U is the matrix ⟦A⟧ of Grosse & Martens (2016); the products with it are this project's.

    Args:
        pixels: The pixels that the patches are read from, without padding, ``[h, w, n, channels]``.
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
        """Share of the (location, tap) pairs that read a pixel; the others read zeros of the padding."""
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
        """Return the patches multiplied by a number."""
        return PatchRows(self.pixels * factor, self.geometry)

    def double(self) -> "PatchRows":
        """Return the patches in float64."""
        return PatchRows(self.pixels.double(), self.geometry)

    def trace(self) -> Tensor:
        """Return tr(UᵀU) = Σ_p w_p |x_p|², as a 0-d tensor; w_p is how many (location, tap) pairs read the pixel p."""
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
        return unfold.split_channels(rows, 1, groups)  # [Q, rows, taps · size]

    def core(self) -> Tensor:
        """Return U Uᵀ, ``[rows, rows]``."""
        return self.cross(self)

    def cross(self, other: "PatchRows") -> Tensor:
        """Return U Wᵀ, where W are the patches of another mini-batch of images of the same size.

        All products of two pixels are added up over taps. Where strides leave so few patches that their products take
        fewer FLOPs, the patches are formed.

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
        for y in self._vertical_reads():
            for x in self._horizontal_reads():
                read = products[y.pixels, x.pixels, :, y.pixels, x.pixels]  # a part of [h, w, n, h, w, n of W]
                total[y.outputs, x.outputs, :, y.outputs, x.outputs] += read
        return total.flatten(3).flatten(0, 2)  # [rows of U, rows of W]

    def multiply(self, matrices: Tensor, groups: ChannelGroups) -> Tensor:
        """Return U M for a matrix M per channel group.

        Args:
            matrices: M, ``[Q, taps · size, d]``.
            groups: The channel groups.

        Returns:
            ``[Q, rows, d]``.
        """
        pixels = groups.split(self.pixels).permute(3, 0, 1, 2, 4)  # [Q, h, w, n, size]
        taps = matrices.unflatten(1, (*self.geometry.kernel_size, -1))  # [Q, kh, kw, size, d]
        product = matrices.new_zeros(len(matrices), *self.output_size, self.pixels.shape[2], matrices.shape[-1])
        for y, x, outputs, read in self.reads():  # product is [Q, h', w', n, d]
            target = product[:, *outputs].flatten(1, 2)  # [Q, line · n, d]
            target.baddbmm_(pixels[:, *read].flatten(1, 2), taps[:, y, x])  # of [Q, line · n, size] and [Q, size, d]
        return product.flatten(1, 3)  # [Q, rows, d]

    def inner_products(self, vectors: Tensor) -> Tensor:
        """Return V Uᵀ, the inner product of each vector with each patch.

        Args:
            vectors: V, ``[m, taps · channels]``.

        Returns:
            ``[m, rows]``.
        """
        taps = vectors.unflatten(1, (*self.geometry.kernel_size, -1))  # [m, kh, kw, channels]
        product = vectors.new_zeros(len(vectors), *self.output_size, self.pixels.shape[2])  # [m, h', w', n]
        for y, x, outputs, read in self.reads():
            line = self.pixels[read].flatten(0, 1)  # [line · n, channels]
            product[:, *outputs].flatten(1).addmm_(taps[:, y, x], line.mT)  # [m, line · n]
        return product.flatten(1)  # [m, rows]

    def subtract_combination_(self, vectors: Tensor, coefficients: Tensor) -> Tensor:
        """Subtract Z U, a linear combination of patches per vector, in place; return the vectors.

        Args:
            vectors: ``[m, taps · channels]``, contiguous.
            coefficients: Z, ``[m, rows]``.
        """
        taps = vectors.view(len(vectors), *self.geometry.kernel_size, -1)  # [m, kh, kw, channels]
        locations = coefficients.unflatten(1, (*self.output_size, -1))  # [m, h', w', n]
        for y, x, outputs, read in self.reads():
            line = self.pixels[read].flatten(0, 1)  # [line · n, channels]
            taps[:, y, x].addmm_(locations[:, *outputs].flatten(1), line, alpha=-1)  # of [m, line · n]
        return vectors

    def reads(self) -> Iterator[tuple[int, int, _Line, _Line]]:
        """Yield a tap (y, x), a line of outputs, and the line of pixels that these outputs read through the tap."""
        for y in self._vertical_reads():
            output_lines = range(y.outputs.start, y.outputs.stop)
            pixel_lines = range(y.pixels.start, y.pixels.stop, y.pixels.step)
            for output_line, pixel_line in zip(output_lines, pixel_lines, strict=True):
                for x in self._horizontal_reads():
                    yield y.tap, x.tap, (output_line, x.outputs), (pixel_line, x.pixels)

    def _vertical_reads(self) -> Iterator[_Read]:
        return _axis_reads(self.geometry, 0, self.pixels.shape[0], self.output_size[0])

    def _horizontal_reads(self) -> Iterator[_Read]:
        return _axis_reads(self.geometry, 1, self.pixels.shape[1], self.output_size[1])


def concatenated(parts: list[PatchRows]) -> PatchRows:
    """Return the patches of several mini-batches of images of one size as those of one mini-batch."""
    if len(parts) == 1:
        return parts[0]
    pixels = torch.cat([part.pixels for part in parts], dim=2)  # [h, w, n of all parts, channels]
    return PatchRows(pixels, parts[0].geometry)


def _axis_reads(geometry: LayerGeometry, axis: int, size: int, num_outputs: int) -> Iterator[_Read]:
    """Yield, for every tap that reads a pixel, the outputs for which it does, and these pixels."""
    stride, step = geometry.stride[axis], geometry.dilation[axis]
    before = geometry.padding_before[axis]
    for tap in range(geometry.kernel_size[axis]):
        shift = tap * step - before  # output i reads pixel stride · i + shift
        first = max(0, -(shift // stride))
        last = min(num_outputs, (size - 1 - shift) // stride + 1)
        if first < last:
            start = stride * first + shift
            yield _Read(tap, slice(first, last), slice(start, start + stride * (last - first - 1) + 1, stride))
