"""Patches: chosen before rows where all rows are patches of a convolution, in one block; they are never formed.

The inverse is the Woodbury identity (see ``rows``) written as (I − Uᵀ(L Lᵀ)⁻¹U)/λ with L Lᵀ = U Uᵀ + λI. V = L⁻¹U is
not formed, as products with patches cost a fraction of products with a matrix of their size (see ``patch_rows``).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kfac_sua.preconditioner.forms.dense import DenseFactor
from kfac_sua.preconditioner.forms.factor import LowRankFactor, TraceSource
from kfac_sua.preconditioner.forms.inverse import ComputedInverse, FactorSizes, Inverse, Shape
from kfac_sua.preconditioner.forms.patch_rows import PatchRows, concatenated, product_width
from kfac_sua.preconditioner.forms.rates import Flops
from kfac_sua.preconditioner.forms.rows import LowRankInverse
from kfac_sua.preconditioner.forms.triangles import BlockMessage
from kfac_sua.preconditioner.forms.unfold import output_size
from kfac_sua.preconditioner.geometry import ChannelGroups, LayerGeometry


@dataclass
class PatchInverse(ComputedInverse):
    """scale · (I − Uᵀ (L Lᵀ)⁻¹ U), with U the patches of a mini-batch, which are not formed.

    Reference: Woodbury (1950).

    Args:
        patches: U, of the one block.
        triangle: L, ``[1, rows, rows]``, lower triangle.
        scale: ``[1, 1, 1]``.
    """

    patches: PatchRows
    triangle: Tensor
    scale: Tensor

    names: ClassVar[tuple[str, ...]] = ("pixels", "triangle", "scale")
    shapes: ClassVar[tuple[Shape, ...]] = (("h", "w", "n", "c"), (1, "rows", "rows"), (1, 1, 1))
    form: ClassVar[str] = "patches"

    def left(self, values: Tensor) -> Tensor:
        """Multiply ``[1, d, n]`` from the left."""
        return self.right(values.mT).mT  # the inverse is symmetric

    def right(self, values: Tensor) -> Tensor:
        """Multiply ``[1, n, d]`` from the right."""
        vectors = values[0].clone(memory_format=torch.contiguous_format)  # [n, d]
        return self._apply_(vectors, self.patches.inner_products(vectors))

    def right_of_patches(self, patches: PatchRows, groups: ChannelGroups) -> Tensor:
        """Multiply patches, which are one group, from the right; ``[1, rows, d]``."""
        if patches.pixels.shape[:2] != self.patches.pixels.shape[:2]:
            return super().right_of_patches(patches, groups)
        return self._apply_(patches.rows(), patches.cross(self.patches))

    def _apply_(self, vectors: Tensor, products: Tensor) -> Tensor:
        """Return scale · (X − P (L Lᵀ)⁻¹ U), ``[1, n, d]``, written over vectors X ``[n, d]``.

        Args:
            vectors: X, contiguous.
            products: P = X Uᵀ, ``[n, rows]``.
        """
        coefficients = torch.cholesky_solve(products.mT, self.triangle[0]).mT  # [n, rows]
        return self.patches.subtract_combination_(vectors, coefficients).mul_(self.scale[0])[None]  # [1, n, d]

    @property
    def num_rows(self) -> int:
        """Rows that it was computed from."""
        return self.triangle.shape[-1]

    @property
    def linear_tensor(self) -> Tensor:
        """The scale."""
        return self.scale

    def to_low_rank(self) -> LowRankInverse:
        """Return the same inverse with its root V = L⁻¹U formed."""
        root = torch.linalg.solve_triangular(self.triangle, self.patches.rows()[None], upper=False)  # [1, rows, d]
        return LowRankInverse(root, self.scale)

    def dense(self) -> Tensor:
        """Return the block, formed, ``[1, d, d]``."""
        return self.to_low_rank().dense()

    def split(self) -> Inverse:
        """Return the parts of V, and the scale."""
        return self.to_low_rank().split()

    def tensors(self) -> dict[str, Tensor]:
        """Return pixels, triangle and scale."""
        return {"pixels": self.patches.pixels, "triangle": self.triangle, "scale": self.scale}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], geometry: LayerGeometry) -> "PatchInverse":
        """Undo :meth:`tensors`."""
        return cls(PatchRows(tensors["pixels"], geometry), tensors["triangle"], tensors["scale"])

    @staticmethod
    def inversion_flops(patch_width: int, rows: int) -> Flops:
        """FLOPs of the matrix U Uᵀ between patches (see ``product_width``) and of its Cholesky factorisation."""
        return Flops(products=2 * rows**2 * patch_width, factorisations=rows**3 // 3)

    @staticmethod
    def application_flops(width: int, rows: int, vectors: int) -> Flops:
        """FLOPs of multiplying vectors of width d if all taps read a pixel: two products with U, and two solves."""
        return Flops(products=4 * vectors * width * rows, solves=2 * vectors * rows**2)

    @property
    def num_operations(self) -> int:
        """Operations of multiplying vectors: two products per line and tap, and four for copy, solves and scale."""
        return 2 * sum(1 for _ in self.patches.reads()) + 4

    @classmethod
    def flops_of(cls, factor: FactorSizes) -> int:
        """FLOPs of inverting the one block."""
        assert isinstance(factor, PatchFactor)
        return cls.inversion_flops(product_width(factor.patches.geometry), factor.core_width).total

    @classmethod
    def message_of(cls, factor: FactorSizes) -> BlockMessage:
        """The triangle, and the scale; every process has the pixels already."""
        return BlockMessage(factor.core_width, factor.core_width, is_triangle=True, num_extra=1)

    def to_message(self) -> tuple[Tensor, Tensor]:
        """Return Lᵀ and the scale."""
        return self.triangle.mT, self.scale.squeeze(-1)  # [1, rows, rows], [1, 1]

    @classmethod
    def from_message(cls, factor: FactorSizes, matrices: Tensor, extra: Tensor) -> "PatchInverse":
        """Take Lᵀ and the scale, and the pixels of the factor."""
        assert isinstance(factor, PatchFactor)
        return cls(factor.patches, matrices.mT, extra.unsqueeze(-1))  # [1, rows, rows], [1, 1, 1]


@dataclass
class PatchFactor(LowRankFactor):
    """Patches of a convolution without groups, as rows of one block.

    Args:
        patches: U.
    """

    patches: PatchRows

    number: ClassVar[int] = 2
    names: ClassVar[tuple[str, ...]] = ("pixels",)
    shapes: ClassVar[tuple[Shape, ...]] = (("h", "w", "n", "c"),)
    num_sizes: ClassVar[int] = 4
    inverse_form: ClassVar[type[ComputedInverse]] = PatchInverse

    @property
    def values(self) -> Tensor:
        """The pixels, ``[h, w, n, channels]``."""
        return self.patches.pixels

    @classmethod
    def of(cls, values: Tensor, geometry: LayerGeometry) -> "PatchFactor":
        """Return the patches that a layer reads from pixels ``[h, w, n, channels]``."""
        return cls(PatchRows(values, geometry))

    def with_values(self, values: Tensor) -> "PatchFactor":
        """Return the patches that are read from other pixels."""
        return PatchFactor.of(values, self.patches.geometry)

    @property
    def num_blocks(self) -> int:
        """1: the rows of convolutions with groups are not kept as patches."""
        return 1

    @property
    def width(self) -> int:
        """Width d of the block: channels times taps."""
        return self.patches.geometry.in_channels * self.patches.geometry.num_taps

    @property
    def num_rows(self) -> int:
        """Number of patches."""
        return self.patches.num_rows

    @classmethod
    def num_rows_of(cls, sizes: Sequence[int], geometry: LayerGeometry) -> int:
        """Return the number of patches that are read from pixels ``[h, w, n, channels]``."""
        height, width = output_size(geometry, sizes[0], sizes[1])
        return height * width * sizes[2]

    @classmethod
    def concatenated(cls, parts: Sequence[LowRankFactor], multiple: float) -> "PatchFactor | None":
        """Return the patches of all parts, multiplied by a number; ``None`` unless all images have one size."""
        patches = [part.patches for part in parts if isinstance(part, PatchFactor)]
        if len(patches) < len(parts) or len({part.pixels.shape[:2] for part in patches}) != 1:
            return None
        return cls(concatenated(patches).scaled(multiple))

    def formed_rows(self) -> Tensor:
        """Return U, formed, ``[1, rows, d]``."""
        return self.patches.rows()[None]  # [1, rows, d]

    def traces(self) -> Tensor:
        """Trace of the block, ``[1]``."""
        return self.patches.trace()[None]  # [1]

    @property
    def trace_source(self) -> TraceSource:
        """The pixels: T times the sum of their squares is an upper bound, as every tap reads a pixel at most once."""
        return TraceSource(self.values, order=2, multiple=float(self.patches.geometry.num_taps))

    def dense(self) -> Tensor:
        """Return UᵀU, ``[1, d, d]``."""
        return DenseFactor.of_rows(self.formed_rows()).blocks

    def core(self) -> Tensor:
        """Return U Uᵀ, ``[1, rows, rows]``."""
        return self.patches.core()[None]  # [1, rows, rows]

    @classmethod
    def invert(
        cls, factors: Sequence["PatchFactor"], triangles: Sequence[Tensor], dampings: Sequence[Tensor]
    ) -> list[ComputedInverse]:
        """Return patches, triangle and scale."""
        return [
            PatchInverse(factor.patches, triangle, damping.reciprocal()[:, None, None])  # scale [1, 1, 1]
            for factor, triangle, damping in zip(factors, triangles, dampings, strict=True)
        ]

    def part(self, blocks: slice) -> "PatchFactor":
        """Return the one block."""
        del blocks
        return self

    def in_float64(self, indices: Tensor) -> "PatchFactor":
        """Return the one block, in float64."""
        del indices
        return PatchFactor(self.patches.double())
