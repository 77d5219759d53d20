"""Dense blocks: chosen for every factor that has too many rows to keep, or that is averaged or decomposed.

Moments add up. A block is inverted by its Cholesky factorisation, blocks of equal size in one call.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from kfac_sua.preconditioner.forms.factor import MomentFactor, TraceSource
from kfac_sua.preconditioner.forms.inverse import ComputedInverse, FactorSizes, Inverse, Shape
from kfac_sua.preconditioner.forms.patch_rows import PatchRows
from kfac_sua.preconditioner.forms.rates import DeviceRates, Flops, rates_of
from kfac_sua.preconditioner.forms.split import SplitInverse, matrix_parts
from kfac_sua.preconditioner.forms.triangles import BlockMessage, mirrored_, triangle_numbers, triangle_pieces, unpack_
from kfac_sua.preconditioner.geometry import ChannelGroups, LayerGeometry

TILE = 64
"""Columns of a product that one multiprocessor of a GPU computes at once, about: a block wider than a few of these
keeps all multiprocessors busy."""

FEWEST_CHUNK_ROWS = 256
"""Fewest rows that are worth a tile of their own, as the results of all tiles have to be added up afterwards."""

LEAF_WIDTH = 64
"""Triangles up to this width are inverted by substitution, all of them in one call; each halving of it would add two
products."""

MAX_READ_SHARE = 0.5
"""Largest share of (location, tap) pairs that read a pixel at which products tap by tap beat one product with patches
formed: half the FLOPs, or less, make up for one small product per line and tap."""


def gram(rows: Tensor) -> Tensor:
    """Return UᵀU = Σ_r u_r u_rᵀ, the moment of rows u_r.

    Of wide blocks only the diagonal blocks and one off-diagonal block are computed; the other one is its transpose.

    Args:
        rows: U, ``[num_blocks, rows, d]``.

    Returns:
        ``[num_blocks, d, d]``, symmetric to rounding.

    Reference: Ā and Ḡ as second moments: Martens & Grosse (2015), Sec. 3.
    """
    num_blocks, num_rows, width = rows.shape
    rates = rates_of(rows.device)
    if width >= rates.symmetric_width:
        left, right = rows.split([width // 2, width - width // 2], dim=-1)  # [num_blocks, rows, d / 2] each
        product = left.mT @ right  # [num_blocks, d / 2, d / 2]
        upper = torch.cat([gram(left), product], dim=-1)  # [num_blocks, d / 2, d]
        return torch.cat([upper, torch.cat([product.mT, gram(right)], dim=-1)], dim=-2)  # [num_blocks, d, d]
    num_chunks = row_chunks(num_blocks, num_rows, width, rates)
    if num_chunks == 1:
        return torch.bmm(rows.mT, rows)  # [num_blocks, d, d]
    # A sum over parts of the rows, all of them in one call. Equal parts leave no rest: any number of parts from just
    # above half of num_chunks up to it will do.
    num_chunks = next((n for n in range(num_chunks, num_chunks // 2, -1) if num_rows % n == 0), num_chunks)
    size = num_rows // num_chunks
    parts = rows[:, : num_chunks * size].reshape(num_blocks * num_chunks, size, width)  # [num_blocks · chunks, size, d]
    total = torch.bmm(parts.mT, parts).view(num_blocks, num_chunks, width, width).sum(1)  # [num_blocks, d, d]
    rest = rows[:, num_chunks * size :]  # [num_blocks, fewer than chunks, d]
    return total.baddbmm_(rest.mT, rest) if rest.shape[1] else total


def row_chunks(num_blocks: int, num_rows: int, width: int, rates: DeviceRates) -> int:
    """Return into how many parts to split the rows of a Gram matrix, so that a device has enough to do at once.

    Each entry of the result is a sum over all rows: few narrow blocks give a GPU few sums to compute, however long.

    Args:
        num_blocks: Number of blocks.
        num_rows: Rows of each.
        width: Width of each.
        rates: Those of the device.

    Returns:
        The number of parts; 1 to compute one product.

    Reference: this project's; the rates say what was measured.
    """
    tiles = num_blocks * (-(-width // TILE)) ** 2
    most_chunks = min(2 * rates.parallel // tiles, num_rows // FEWEST_CHUNK_ROWS)
    # The copy that makes the parts contiguous and their sum are two more launches.
    is_long = num_rows * rates.tile_row_s > 2 * rates.launch_s
    return most_chunks if rates.parallel > 1 and most_chunks > 1 and is_long else 1


def inverses_of_triangles(triangles: Tensor) -> Tensor:
    """Return (L Lᵀ)⁻¹ for lower triangles L, ``[num_blocks, d, d]``, in the way that is fastest on their device.

    Reference: (L Lᵀ)⁻¹ = L⁻ᵀ L⁻¹; Golub & Van Loan, *Matrix Computations*, Sec. 4.2 (Cholesky factorisation).
    """
    if triangles.shape[-1] < rates_of(triangles.device).product_inverse_width:
        return torch.cholesky_inverse(triangles)
    return gram(inverted_triangles(triangles))


def inverted_triangles(triangles: Tensor) -> Tensor:
    """Return L⁻¹ for lower triangles L, ``[num_blocks, d, d]``, mostly by matrix products.

    A power of two of diagonal blocks is inverted by substitution in one call. Each pair of neighbours then gives the
    inverse of a block twice as wide, [[A, 0], [C, B]]⁻¹ = [[A⁻¹, 0], [−B⁻¹ C A⁻¹, B⁻¹]], all pairs in two products,
    until one block is left.

    Reference: the block form of forward substitution, Golub & Van Loan, *Matrix Computations*, Sec. 3.1.
    """
    width = triangles.shape[-1]
    num_levels = max(0, math.ceil(math.log2(width / LEAF_WIDTH)))
    size = -(-width // 2**num_levels)
    padding = size * 2**num_levels - width
    if padding:  # with ones on the diagonal, so that the padded triangle stays invertible and its inverse is padded too
        triangles = F.pad(triangles, (0, padding, 0, padding))  # [num_blocks, d + padding, d + padding]
        triangles.diagonal(dim1=-2, dim2=-1)[:, width:] = 1
    leaves = _diagonal_blocks(triangles, size)  # [num_blocks · 2^levels, size, size]
    ones = torch.eye(size, dtype=triangles.dtype, device=triangles.device)
    inverse = torch.linalg.solve_triangular(leaves, ones, upper=False)
    for _ in range(num_levels):
        first, second = inverse.unflatten(0, (-1, 2)).unbind(1)  # [pairs, size, size] each
        between = _diagonal_blocks(triangles, 2 * size)[:, size:, :size]  # [pairs, size, size]
        pairs = inverse.new_zeros(len(first), 2 * size, 2 * size)
        pairs[:, :size, :size] = first
        pairs[:, size:, size:] = second
        pairs[:, size:, :size] = torch.bmm(second, torch.bmm(between, first)).neg_()
        inverse, size = pairs, 2 * size
    return inverse[:, :width, :width] if padding else inverse  # [num_blocks, d, d]


def _diagonal_blocks(matrices: Tensor, size: int) -> Tensor:
    """Return the diagonal blocks of this size of ``[num_blocks, d, d]``: ``[num_blocks · d / size, size, size]``."""
    blocks = matrices.unflatten(2, (-1, size)).unflatten(1, (-1, size))  # [num_blocks, n, size, n, size]
    diagonal = blocks.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)  # [num_blocks, n, size, size]
    return diagonal.reshape(-1, size, size)  # [num_blocks · n, size, size]


def concatenated(parts: Sequence[Tensor]) -> Tensor:
    """Return the blocks of all parts in one tensor, not copied if there is only one part."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))  # [blocks of all parts, ...]


@dataclass
class DenseInverse(ComputedInverse):
    """Inverse blocks, symmetric, ``[num_blocks, d, d]``.

    Reference: from a Cholesky factorisation, see :func:`inverses_of_triangles`.
    """

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
        """Write what :meth:`right` returns into ``out``, without a copy."""
        torch.bmm(values, self.blocks, out=out)

    def right_of_patches(self, patches: PatchRows, groups: ChannelGroups) -> Tensor:
        """Multiply patches in channel groups from the right, tap by tap where most taps read zeros of the padding."""
        if patches.read_share > MAX_READ_SHARE:
            return super().right_of_patches(patches, groups)
        return patches.multiply(self.blocks, groups)

    @property
    def num_rows(self) -> int:
        """0: it was computed from moments."""
        return 0

    @property
    def linear_tensor(self) -> Tensor:
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
        """FLOPs per block: Cholesky factorisation (d³/3, Golub & Van Loan, Sec. 4.2) and inverse from it (2 d³/3)."""
        return Flops(inversions=width**3)

    @staticmethod
    def application_flops(width: int, vectors: int) -> int:
        """FLOPs per block of multiplying vectors of width d."""
        return 2 * vectors * width**2

    @classmethod
    def flops_of(cls, factor: FactorSizes) -> int:
        """FLOPs per block of inverting it."""
        return cls.inversion_flops(factor.width).total

    @classmethod
    def message_of(cls, factor: FactorSizes) -> BlockMessage:
        """One triangle of the inverse block, which is symmetric."""
        return BlockMessage(factor.width, factor.width, is_triangle=True, num_extra=0)

    def to_message(self) -> tuple[Tensor, Tensor]:
        """Return the blocks, and empty vectors."""
        return self.blocks, self.blocks.new_empty(len(self.blocks), 0)

    @classmethod
    def from_message(cls, factor: FactorSizes, matrices: Tensor, extra: Tensor) -> "DenseInverse":
        """Take upper triangles, and fill the lower ones in place."""
        del factor, extra
        return cls(mirrored_(matrices))


@dataclass
class DenseFactor(MomentFactor):
    """Symmetric positive semi-definite blocks, ``[num_blocks, d, d]``."""

    blocks: Tensor

    names: ClassVar[tuple[str, ...]] = ("blocks",)
    shapes: ClassVar[tuple[Shape, ...]] = (("b", "d", "d"),)
    inverse_form: ClassVar[type[ComputedInverse]] = DenseInverse

    @classmethod
    def is_chosen(cls, width: int) -> bool:
        """True for every width."""
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
        """Return blocks of zeros, with the dtype and the device of ``like``."""
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
        """Return the factor of these blocks."""
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

    def matmul(self, values: Tensor) -> Tensor:
        """Multiply ``[num_blocks, d, n]`` by the blocks from the left."""
        return torch.bmm(self.blocks, values)

    def core(self) -> Tensor:
        """Return the blocks themselves."""
        return self.blocks

    def loses_damping(self, dampings: Tensor) -> None:
        """Never: nothing is divided by the damping."""

    @classmethod
    def invert(
        cls, factors: Sequence["DenseFactor"], triangles: Sequence[Tensor], dampings: Sequence[Tensor]
    ) -> list[ComputedInverse]:
        """Return (L Lᵀ)⁻¹ of all blocks, in one call."""
        del factors, dampings
        blocks = inverses_of_triangles(concatenated(triangles))  # [blocks of all factors, d, d]
        parts = blocks.split([len(triangle) for triangle in triangles])  # [num_blocks, d, d] each
        return [DenseInverse(part) for part in parts]

    def pieces(self) -> Iterator[Tensor]:
        """Yield views that cover the upper triangles of all blocks."""
        return triangle_pieces(self.blocks)

    def from_numbers_(self, numbers: Tensor) -> "DenseFactor":
        """Fill the blocks from their upper triangles."""
        mirrored_(unpack_(self.blocks, numbers))
        return self

    @classmethod
    def count_numbers(cls, width: int) -> int:
        """Return how many numbers an upper triangle is sent as."""
        return triangle_numbers(width)
