"""Dense blocks: chosen for every factor whose rows are too many to keep, or whose moments are averaged or decomposed.

Moments add up. A block is inverted by its Cholesky factorisation, those of equal size in one call.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from kfac_sua.preconditioner.forms.form import BlockMessage, Factor, Inverse, MadeInverse, Shape, SumFactor, TraceSource
from kfac_sua.preconditioner.forms.patch_rows import PatchRows
from kfac_sua.preconditioner.forms.rates import DeviceRates, Flops, rates_of
from kfac_sua.preconditioner.forms.split import SplitInverse, matrix_parts
from kfac_sua.preconditioner.forms.triangles import mirrored_, triangle_numbers, triangle_pieces, unpack_
from kfac_sua.preconditioner.geometry import ChannelGroups, LayerGeometry

TILE = 64
"""Columns of a product that a multiprocessor of a GPU takes on at once, about: wide blocks keep all of them busy."""

FEWEST_CHUNK_ROWS = 256
"""Rows that a product needs to be worth a tile of its own, whose result has to be added to the others'."""

LEAF_WIDTH = 64
"""Triangles up to this width are inverted by substitution, wider ones by products of what has been inverted."""

MAX_READ_SHARE = 0.5
"""Share of the taps that may read a pixel for products tap by tap to beat one product with patches formed."""


def gram(rows: Tensor) -> Tensor:
    """Return UᵀU = Σ_r u_r u_rᵀ, the moment of rows u_r; of wide blocks one triangle is computed, and mirrored.

    Args:
        rows: U, ``[num_blocks, rows, d]``.

    Returns:
        ``[num_blocks, d, d]``, symmetric to rounding.
    """
    num_blocks, num_rows, width = rows.shape
    rates = rates_of(rows.device)
    if width >= rates.symmetric_width:
        left, right = rows.split([width // 2, width - width // 2], dim=-1)  # [blocks, rows, d / 2] each
        product = left.mT @ right  # [blocks, d / 2, d / 2]
        upper = torch.cat([gram(left), product], dim=-1)  # [blocks, d / 2, d]
        return torch.cat([upper, torch.cat([product.mT, gram(right)], dim=-1)], dim=-2)  # [blocks, d, d]
    num_chunks = row_chunks(num_blocks, num_rows, width, rates)
    return torch.bmm(rows.mT, rows) if num_chunks == 1 else _gram_in_chunks(rows, num_chunks)  # [blocks, d, d]


def row_chunks(num_blocks: int, num_rows: int, width: int, rates: DeviceRates) -> int:
    """Return into how many parts to split the rows of a Gram matrix, so that a device has enough to do at once.

    Each entry of the result is a sum over all rows: few narrow blocks give a GPU few sums to work on, be they long.

    Args:
        num_blocks: Blocks of the result.
        num_rows: Rows of each.
        width: Columns of each.
        rates: Those of the device.
    """
    tiles = num_blocks * (-(-width // TILE)) ** 2
    most_chunks = min(2 * rates.parallel // tiles, num_rows // FEWEST_CHUNK_ROWS)
    # A copy of what is a view, and a sum, come on top.
    is_long = num_rows * rates.tile_row_s > 2 * rates.launch_s
    return most_chunks if rates.parallel > 1 and most_chunks > 1 and is_long else 1


def _gram_in_chunks(rows: Tensor, num_chunks: int) -> Tensor:
    """Return UᵀU as a sum over parts of the rows, all of them in one call."""
    num_blocks, num_rows, width = rows.shape
    # Equal parts need no rest: any number between half as many and as many does.
    num_chunks = next((n for n in range(num_chunks, num_chunks // 2, -1) if num_rows % n == 0), num_chunks)
    size = num_rows // num_chunks
    parts = rows[:, : num_chunks * size].reshape(num_blocks * num_chunks, size, width)  # [blocks · chunks, size, d]
    total = torch.bmm(parts.mT, parts).view(num_blocks, num_chunks, width, width).sum(1)  # [blocks, d, d]
    rest = rows[:, num_chunks * size :]  # [blocks, fewer than chunks, d]
    return total.baddbmm_(rest.mT, rest) if rest.shape[1] else total


def inverses_of_triangles(triangles: Tensor) -> Tensor:
    """Return (L Lᵀ)⁻¹ of lower triangles L, ``[num_blocks, d, d]``, in the way that is fastest on their device."""
    if triangles.shape[-1] < rates_of(triangles.device).product_inverse_width:
        return torch.cholesky_inverse(triangles)
    return gram(inverted_triangles(triangles))


def inverted_triangles(triangles: Tensor) -> Tensor:
    """Return L⁻¹ of lower triangles L, ``[num_blocks, d, d]``, out of products.

    Blocks on the diagonal, as many as a power of two, are inverted by substitution in one call; pairs of neighbours are
    then joined by [[A, 0], [C, B]]⁻¹ = [[A⁻¹, 0], [−B⁻¹ C A⁻¹, B⁻¹]], all pairs in two products, and so on.
    """
    width = triangles.shape[-1]
    num_levels = max(0, math.ceil(math.log2(width / LEAF_WIDTH)))
    size = -(-width // 2**num_levels)
    padding = size * 2**num_levels - width
    if padding:  # with ones on the diagonal, which stay apart
        triangles = F.pad(triangles, (0, padding, 0, padding))
        triangles.diagonal(dim1=-2, dim2=-1)[:, width:] = 1
    leaves = _diagonal_blocks(triangles, size)  # [blocks · 2^levels, size, size]
    ones = torch.eye(size, dtype=triangles.dtype, device=triangles.device)
    inverse = torch.linalg.solve_triangular(leaves, ones, upper=False)
    for _ in range(num_levels):
        first, second = inverse.unflatten(0, (-1, 2)).unbind(1)  # [pairs, size, size] each
        between = _diagonal_blocks(triangles, 2 * size)[:, size:, :size]  # [pairs, size, size]
        joined_pairs = inverse.new_zeros(len(first), 2 * size, 2 * size)
        joined_pairs[:, :size, :size] = first
        joined_pairs[:, size:, size:] = second
        joined_pairs[:, size:, :size] = torch.bmm(second, torch.bmm(between, first)).neg_()
        inverse, size = joined_pairs, 2 * size
    return inverse[:, :width, :width] if padding else inverse


def _diagonal_blocks(matrices: Tensor, size: int) -> Tensor:
    """Return the blocks of this size on the diagonals of ``[num_blocks, d, d]``: ``[num_blocks · d / size, …]``."""
    blocks = matrices.unflatten(2, (-1, size)).unflatten(1, (-1, size))  # [blocks, n, size, n, size]
    diagonal = blocks.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)  # [blocks, n, size, size]
    return diagonal.reshape(-1, size, size)  # [blocks · n, size, size]


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Return the blocks of all parts in one tensor, not copied if there is but one part."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


@dataclass
class DenseInverse(MadeInverse):
    """Inverse blocks, symmetric, ``[num_blocks, d, d]``."""

    blocks: Tensor

    names: ClassVar[tuple[str, ...]] = ("blocks",)
    shapes: ClassVar[tuple[Shape, ...]] = (("b", "d", "d"),)
    form: ClassVar[str] = "dense"

    def left(self, values: Tensor) -> Tensor:
        """Multiply ``[num_blocks, d, n]`` from the left."""
        return torch.bmm(self.blocks, values)

    def right(self, values: Tensor) -> Tensor:
        """Multiply ``[num_blocks, n, d]`` from the right."""
        return torch.bmm(values, self.blocks)

    def right_into(self, values: Tensor, out: Tensor) -> None:
        """Write the product where it belongs."""
        torch.bmm(values, self.blocks, out=out)

    def right_of_patches(self, patches: PatchRows, groups: ChannelGroups) -> Tensor:
        """Multiply patches in channel groups from the right, tap by tap where few taps read a pixel."""
        if patches.read_share > MAX_READ_SHARE:
            return super().right_of_patches(patches, groups)
        return patches.multiply(self.blocks, groups)

    @property
    def num_rows(self) -> int:
        """None: it is made of moments."""
        return 0

    @property
    def scaled(self) -> Tensor:
        """The blocks."""
        return self.blocks

    def dense(self) -> Tensor:
        """Return the blocks themselves."""
        return self.blocks

    def split(self) -> Inverse:
        """Return the parts of the blocks."""
        return SplitInverse(matrix_parts(self.blocks))

    @staticmethod
    def inversion_flops(width: int) -> Flops:
        """FLOPs per block: Cholesky factorisation (d³/3) and inverse from it (2 d³/3)."""
        return Flops(inversions=width**3)

    @staticmethod
    def application_flops(width: int, vectors: int) -> int:
        """FLOPs per block of multiplying vectors."""
        return 2 * vectors * width**2

    @classmethod
    def flops_of(cls, factor: Factor) -> int:
        """FLOPs per block."""
        return cls.inversion_flops(factor.width).total

    @classmethod
    def message_of(cls, factor: Factor) -> BlockMessage:
        """One triangle of the block."""
        return BlockMessage(factor.width, factor.width, is_triangle=True, num_extra=0)

    def to_message(self) -> tuple[Tensor, Tensor]:
        """Return the blocks, and nothing else."""
        return self.blocks, self.blocks.new_empty(len(self.blocks), 0)

    @classmethod
    def from_message(cls, factor: Factor, matrices: Tensor, extra: Tensor) -> "DenseInverse":
        """Take upper triangles; the lower ones are filled in place."""
        del factor, extra
        return cls(mirrored_(matrices))


@dataclass
class DenseFactor(SumFactor):
    """Symmetric positive semi-definite blocks, ``[num_blocks, d, d]``."""

    blocks: Tensor

    names: ClassVar[tuple[str, ...]] = ("blocks",)
    shapes: ClassVar[tuple[Shape, ...]] = (("b", "d", "d"),)
    inverse_form: ClassVar[type[MadeInverse]] = DenseInverse

    @classmethod
    def is_chosen(cls, width: int) -> bool:
        """Whatever the width."""
        del width
        return True

    @staticmethod
    def moment_flops(width: int, rows: int) -> int:
        """FLOPs per block of forming the moment of rows."""
        return 2 * rows * width**2

    @classmethod
    def of_rows(cls, rows: Tensor) -> "DenseFactor":
        """Return the Gram matrices of rows ``[num_blocks, rows, d]``."""
        return cls(gram(rows))

    @classmethod
    def zeros(cls, num_blocks: int, width: int, like: Tensor) -> "DenseFactor":
        """Return blocks of zeros."""
        return cls(like.new_zeros(num_blocks, width, width))

    @property
    def values(self) -> Tensor:
        """The blocks."""
        return self.blocks

    @classmethod
    def of(cls, values: Tensor, geometry: LayerGeometry) -> "DenseFactor":
        """Return the factor of these blocks."""
        del geometry
        return cls(values)

    def with_values(self, values: Tensor) -> "DenseFactor":
        """Return other blocks."""
        return DenseFactor(values)

    @property
    def width(self) -> int:
        """Width d of a block."""
        return self.blocks.shape[-1]

    @property
    def core_width(self) -> int:
        """Width d of a block."""
        return self.width

    def traces(self) -> Tensor:
        """Trace of every block, ``[num_blocks]``."""
        return self.blocks.diagonal(dim1=-2, dim2=-1).sum(-1)

    @property
    def trace_source(self) -> TraceSource:
        """The diagonals."""
        return TraceSource(self.blocks.diagonal(dim1=-2, dim2=-1), order=1)

    def dense(self) -> Tensor:
        """Return the blocks themselves."""
        return self.blocks

    def times(self, values: Tensor) -> Tensor:
        """Multiply ``[num_blocks, d, n]`` by the blocks."""
        return torch.bmm(self.blocks, values)

    def core(self) -> Tensor:
        """Return the blocks themselves."""
        return self.blocks

    def loses_damping(self, dampings: Tensor) -> None:
        """Never: nothing is divided by the damping."""

    @classmethod
    def invert(
        cls, factors: Sequence["DenseFactor"], triangles: Sequence[Tensor], dampings: Sequence[Tensor]
    ) -> list[MadeInverse]:
        """Return (L Lᵀ)⁻¹ of all blocks, in one call."""
        del factors, dampings
        blocks = inverses_of_triangles(joined(triangles))  # [blocks of all factors, d, d]
        return [DenseInverse(part) for part in blocks.split([len(triangle) for triangle in triangles])]

    def pieces(self) -> Iterator[Tensor]:
        """Yield what covers the upper triangles of all blocks."""
        return triangle_pieces(self.blocks)

    def from_numbers_(self, numbers: Tensor) -> "DenseFactor":
        """Fill the blocks from their upper triangles."""
        mirrored_(unpack_(self.blocks, numbers))
        return self

    @classmethod
    def count_numbers(cls, width: int) -> int:
        """Return the numbers of an upper triangle."""
        return triangle_numbers(width)
