"""Dense blocks: chosen for every factor whose rows are too many to keep, or whose moments are averaged or decomposed.

Moments add up. A block is inverted by its Cholesky factorisation, those of equal size in one call.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kfac_sua.preconditioner.forms.form import BlockMessage, Factor, Inverse, SumFactor
from kfac_sua.preconditioner.forms.patch_rows import PatchRows
from kfac_sua.preconditioner.forms.triangles import mirrored_, triangle_numbers, triangle_pieces, unpack_
from kfac_sua.preconditioner.geometry import ChannelGroups, LayerGeometry

SYMMETRIC_WIDTH = 256
"""Width from which a quarter of a Gram matrix is worth leaving out (measured on a CPU: 24 to 30 % faster)."""

MAX_READ_SHARE = 0.5
"""Share of the taps that may read a pixel for products tap by tap to beat one product with patches formed."""


def gram(rows: Tensor) -> Tensor:
    """Return UᵀU = Σ_r u_r u_rᵀ, the moment of rows u_r; of wide blocks one triangle is computed, and mirrored.

    Args:
        rows: U, ``[num_blocks, rows, d]``.

    Returns:
        ``[num_blocks, d, d]``, symmetric to rounding.
    """
    width = rows.shape[-1]
    if width < SYMMETRIC_WIDTH:
        return rows.mT @ rows  # [blocks, d, d]
    left, right = rows.split([width // 2, width - width // 2], dim=-1)  # [blocks, rows, d / 2] each
    product = left.mT @ right  # [blocks, d / 2, d / 2]
    upper = torch.cat([gram(left), product], dim=-1)  # [blocks, d / 2, d]
    return torch.cat([upper, torch.cat([product.mT, gram(right)], dim=-1)], dim=-2)  # [blocks, d, d]


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Return the blocks of all parts in one tensor, not copied if there is but one part."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


@dataclass
class DenseInverse(Inverse):
    """Inverse blocks, symmetric, ``[num_blocks, d, d]``."""

    blocks: Tensor

    names: ClassVar[tuple[str, ...]] = ("blocks",)

    def left(self, values: Tensor) -> Tensor:
        """Multiply ``[num_blocks, d, n]`` from the left."""
        return torch.bmm(self.blocks, values)

    def right(self, values: Tensor) -> Tensor:
        """Multiply ``[num_blocks, n, d]`` from the right."""
        return torch.bmm(values, self.blocks)

    def right_of_patches(self, patches: PatchRows, groups: ChannelGroups) -> Tensor:
        """Multiply patches in channel groups from the right, tap by tap where few taps read a pixel."""
        if patches.read_share > MAX_READ_SHARE:
            return super().right_of_patches(patches, groups)
        return patches.multiply(self.blocks, groups)

    def scale_(self, factor: float) -> None:
        """Multiply the inverse by a number, in place."""
        self.blocks.mul_(factor)

    @staticmethod
    def inversion_flops(width: int) -> int:
        """FLOPs per block: Cholesky factorisation (d³/3) and inverse from it (2 d³/3)."""
        return width**3

    @staticmethod
    def application_flops(width: int, vectors: int) -> int:
        """FLOPs per block of multiplying vectors."""
        return 2 * vectors * width**2

    @classmethod
    def flops_of(cls, factor: Factor) -> int:
        """FLOPs per block."""
        return cls.inversion_flops(factor.width)

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
    inverse_form: ClassVar[type[Inverse]] = DenseInverse

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

    def dense(self) -> Tensor:
        """Return the blocks themselves."""
        return self.blocks

    def times(self, values: Tensor) -> Tensor:
        """Multiply ``[num_blocks, d, n]`` by the blocks."""
        return torch.bmm(self.blocks, values)

    def core(self) -> Tensor:
        """Return a copy of the blocks."""
        return self.blocks.clone()

    def loses_damping(self, dampings: Tensor) -> Tensor:
        """Never: nothing is divided by the damping."""
        return torch.zeros_like(dampings, dtype=torch.bool)

    @classmethod
    def invert(
        cls, factors: Sequence["DenseFactor"], triangles: Sequence[Tensor], dampings: Sequence[Tensor]
    ) -> list[Inverse]:
        """Return (L Lᵀ)⁻¹ of all blocks, in one call."""
        del factors, dampings
        blocks = torch.cholesky_inverse(joined(triangles))  # [blocks of all factors, d, d]
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
