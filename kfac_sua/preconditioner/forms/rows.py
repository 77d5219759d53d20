"""Rows: chosen where a mini-batch has so few rows that the Woodbury identity takes less time than a dense inverse.

(UᵀU + λI)⁻¹ = (I − VᵀV)/λ, exactly, with V = L⁻¹U and L Lᵀ = U Uᵀ + λI (Woodbury 1950; Golub & Van Loan, *Matrix
Computations*, Sec. 2.1): the matrix that is factorised is as wide as there are rows, and the block is never formed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kfac_sua.preconditioner.forms.dense import DenseFactor, gram
from kfac_sua.preconditioner.forms.factor import LowRankFactor, TraceSource
from kfac_sua.preconditioner.forms.inverse import ComputedInverse, FactorSizes, Inverse, Shape
from kfac_sua.preconditioner.forms.rates import Flops
from kfac_sua.preconditioner.forms.split import SplitLowRankInverse, matrix_parts
from kfac_sua.preconditioner.forms.triangles import BlockMessage
from kfac_sua.preconditioner.geometry import LayerGeometry


@dataclass
class LowRankInverse(ComputedInverse):
    """scale · (I − rootᵀ root), with ``root`` ``[num_blocks, rows, d]`` and ``scale`` ``[num_blocks, 1, 1]``.

    Reference: Woodbury (1950), with the triangle of a Cholesky factorisation in the root.
    """

    root: Tensor
    scale: Tensor

    names: ClassVar[tuple[str, ...]] = ("root", "scale")
    shapes: ClassVar[tuple[Shape, ...]] = (("b", "rows", "d"), ("b", 1, 1))
    form: ClassVar[str] = "rows"

    def left(self, values: Tensor) -> Tensor:
        """Multiply ``[num_blocks, d, n]`` from the left."""
        products = torch.bmm(self.root, values)  # [num_blocks, rows, n]
        return torch.baddbmm(values, self.root.mT, products, alpha=-1).mul_(self.scale)  # [num_blocks, d, n]

    def right(self, values: Tensor) -> Tensor:
        """Multiply ``[num_blocks, n, d]`` from the right."""
        products = torch.bmm(values, self.root.mT)  # [num_blocks, n, rows]
        return torch.baddbmm(values, products, self.root, alpha=-1).mul_(self.scale)  # [num_blocks, n, d]

    @property
    def num_rows(self) -> int:
        """Rows that it was computed from."""
        return self.root.shape[-2]

    @property
    def linear_tensor(self) -> Tensor:
        """The scale."""
        return self.scale

    def dense(self) -> Tensor:
        """Return scale · (I − rootᵀ root), formed, ``[num_blocks, d, d]``."""
        blocks = gram(self.root).mul_(-self.scale)
        blocks.diagonal(dim1=-2, dim2=-1).add_(self.scale.squeeze(-1))  # [num_blocks, 1] to [num_blocks, d]
        return blocks

    def split(self) -> Inverse:
        """Return the parts of the root, and the scale."""
        return SplitLowRankInverse(matrix_parts(self.root), self.scale)

    @staticmethod
    def inversion_flops(width: int, rows: int) -> Flops:
        """FLOPs per block: Gram matrix between rows, its Cholesky factorisation, and the triangular solve."""
        return Flops(products=2 * rows**2 * width, factorisations=rows**3 // 3, solves=rows**2 * width)

    @staticmethod
    def application_flops(width: int, rows: int, vectors: int) -> int:
        """FLOPs per block of multiplying vectors of width d: a product with V, and one with Vᵀ."""
        return 4 * vectors * width * rows

    @classmethod
    def flops_of(cls, factor: FactorSizes) -> int:
        """FLOPs per block of inverting it."""
        return cls.inversion_flops(factor.width, factor.core_width).total

    @classmethod
    def message_of(cls, factor: FactorSizes) -> BlockMessage:
        """The root, and the scale."""
        return BlockMessage(factor.core_width, factor.width, is_triangle=False, num_extra=1)

    def to_message(self) -> tuple[Tensor, Tensor]:
        """Return root and scale."""
        return self.root, self.scale.squeeze(-1)  # [num_blocks, rows, d], [num_blocks, 1]

    @classmethod
    def from_message(cls, factor: FactorSizes, matrices: Tensor, extra: Tensor) -> "LowRankInverse":
        """Take root and scale."""
        del factor
        return cls(matrices, extra.unsqueeze(-1))  # [num_blocks, rows, d], [num_blocks, 1, 1]


@dataclass
class RowsFactor(LowRankFactor):
    """Rows ``[num_blocks, rows, d]``."""

    rows: Tensor

    number: ClassVar[int] = 1
    names: ClassVar[tuple[str, ...]] = ("rows",)
    shapes: ClassVar[tuple[Shape, ...]] = (("b", "rows", "d"),)
    num_sizes: ClassVar[int] = 3
    inverse_form: ClassVar[type[ComputedInverse]] = LowRankInverse

    @property
    def values(self) -> Tensor:
        """The rows."""
        return self.rows

    @classmethod
    def of(cls, values: Tensor, geometry: LayerGeometry) -> "RowsFactor":
        """Return the factor of these rows."""
        del geometry
        return cls(values)

    def with_values(self, values: Tensor) -> "RowsFactor":
        """Return the factor of these rows."""
        return RowsFactor(values)

    @property
    def width(self) -> int:
        """Width d of a block."""
        return self.rows.shape[-1]

    @property
    def num_rows(self) -> int:
        """Rows of a block."""
        return self.rows.shape[-2]

    @classmethod
    def num_rows_of(cls, sizes: Sequence[int], geometry: LayerGeometry) -> int:
        """Return the second of the sizes ``[num_blocks, rows, d]``."""
        del geometry
        return sizes[1]

    @classmethod
    def concatenated(cls, parts: Sequence[LowRankFactor], multiple: float) -> "RowsFactor":
        """Return all rows in one tensor, multiplied by a number."""
        rows = torch.cat([part.formed_rows() for part in parts], dim=1)  # [num_blocks, rows of all parts, d]
        return cls(rows.mul_(multiple))

    def formed_rows(self) -> Tensor:
        """Return the rows themselves."""
        return self.rows

    def traces(self) -> Tensor:
        """Trace of every block, ``[num_blocks]``."""
        return self.rows.square().sum((-2, -1))

    @property
    def trace_source(self) -> TraceSource:
        """The rows."""
        return TraceSource(self.rows, order=2)

    def dense(self) -> Tensor:
        """Return UᵀU, ``[num_blocks, d, d]``."""
        return DenseFactor.of_rows(self.rows).blocks

    def core(self) -> Tensor:
        """Return U Uᵀ, ``[num_blocks, rows, rows]``."""
        return self.rows @ self.rows.mT  # [num_blocks, rows, rows]

    @classmethod
    def invert(
        cls, factors: Sequence["RowsFactor"], triangles: Sequence[Tensor], dampings: Sequence[Tensor]
    ) -> list[ComputedInverse]:
        """Return scale and root of each factor, one after the other: their rows may have different widths."""
        return [
            LowRankInverse(
                torch.linalg.solve_triangular(triangle, factor.rows, upper=False),  # [num_blocks, rows, d]
                damping.reciprocal()[:, None, None],  # [num_blocks, 1, 1]
            )
            for factor, triangle, damping in zip(factors, triangles, dampings, strict=True)
        ]
