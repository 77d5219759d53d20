"""Split inverses: chosen where three products of bfloat16 parts on tensor cores are faster than one float32 product.

A float32 matrix is approximated by a high part, the matrix rounded to bfloat16, plus a low part, the rest rounded to
bfloat16. Of the four products of two such matrices three are computed and added up in float32,
M V ≈ Mₕ Vₕ + Mₕ Vₗ + Mₗ Vₕ (Henry, Tang & Heinecke 2019, *Leveraging the bfloat16 Artificial Intelligence Datatype for
Higher-Precision Computations*). Their relative error is about 2⁻¹⁶; that of one bfloat16 product is 2⁻⁸, that of one
TF32 product 2⁻¹¹. In directions of high curvature the error grows by the ratio of eigenvalues (see ``docs/gpu.md``).

All three products are one product with an inner dimension three times as long. An inverse is split once per refresh, a
gradient once per step and side.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from kfac_sua.preconditioner.forms.inverse import Inverse, Shape

PART_BYTES = 2 * 3
"""Bytes of a number's three parts, of two bytes each."""

SPLIT_OPERATIONS = 3
"""Operations of a product in parts: two that split the gradient, and the product."""

ALIGNED = 8
"""Numbers of bfloat16 that tensor cores read at once (16 bytes): widths are padded with zeros to a multiple of it."""


def matrix_parts(values: Tensor) -> Tensor:
    """Return the parts of matrices, ``[b, m, d]`` to ``[b, m, 3, d′]``: high, high, low.

    d′ is d rounded up to a multiple of :data:`ALIGNED`; the padding is zero. PyTorch's conversion rounds to the
    nearest, ties to even; a tensor core itself would cut bits off.

    Reference: Henry, Tang & Heinecke (2019), the sum of two bfloat16 numbers for one of float32.
    """
    return _parts(_padded(values, -1), dim=2, is_vector=False)


def aligned(width: int) -> int:
    """Return the width d′ of the parts of matrices of this width."""
    return width + -width % ALIGNED


@dataclass
class SplitInverse(Inverse):
    """Inverse blocks, symmetric, as parts ``[num_blocks, d, 3, d′]``.

    Reference: Henry, Tang & Heinecke (2019).
    """

    parts: Tensor

    names: ClassVar[tuple[str, ...]] = ("parts",)
    shapes: ClassVar[tuple[Shape, ...]] = (("b", "d", 3, "d'"),)
    form: ClassVar[str] = "dense bf16x3"

    def left(self, values: Tensor) -> Tensor:
        """Multiply ``[num_blocks, d, n]`` from the left."""
        split = _vector_parts(_padded(values, -2), 1).flatten(1, 2)  # [b, 3 · d′, n]
        return _product(self.parts.flatten(2), split).to(values.dtype)  # [b, d, n]

    def right(self, values: Tensor) -> Tensor:
        """Multiply ``[num_blocks, n, d]`` from the right."""
        split = _vector_parts(_padded(values, -1), 2).flatten(2)  # [b, n, 3 · d′]
        return _product(split, self.parts.flatten(2).mT).to(values.dtype)  # [b, n, d]


@dataclass
class SplitLowRankInverse(Inverse):
    """scale · (I − rootᵀ root), with the root as parts ``[num_blocks, rows, 3, d′]``, and scale ``[num_blocks, 1, 1]``.

    The product with the root is split again before it is multiplied by the transposed root.

    Reference: Woodbury (1950); Henry, Tang & Heinecke (2019).
    """

    root_parts: Tensor
    scale: Tensor

    names: ClassVar[tuple[str, ...]] = ("root_parts", "scale")
    shapes: ClassVar[tuple[Shape, ...]] = (("b", "rows", 3, "d'"), ("b", 1, 1))
    form: ClassVar[str] = "rows bf16x3"

    def left(self, values: Tensor) -> Tensor:
        """Multiply ``[num_blocks, d, n]`` from the left."""
        split = _vector_parts(_padded(values, -2), 1).flatten(1, 2)  # [b, 3 · d′, n]
        inner = _vector_parts(_product(self.root_parts.flatten(2), split), 2).flatten(1, 2)  # [b, rows · 3, n]
        outer = _product(self.root_parts.flatten(1, 2).mT, inner)[:, : values.shape[1]]  # [b, d, n]
        return (values - outer).mul_(self.scale)

    def right(self, values: Tensor) -> Tensor:
        """Multiply ``[num_blocks, n, d]`` from the right."""
        split = _vector_parts(_padded(values, -1), 2).flatten(2)  # [b, n, 3 · d′]
        inner = _vector_parts(_product(split, self.root_parts.flatten(2).mT), 3).flatten(2)  # [b, n, rows · 3]
        outer = _product(inner, self.root_parts.flatten(1, 2))[..., : values.shape[2]]  # [b, n, d]
        return (values - outer).mul_(self.scale)


def _padded(values: Tensor, dim: int) -> Tensor:
    """Return ``[b, m, n]`` with zeros up to a multiple of :data:`ALIGNED` along one of the last two dimensions."""
    missing = aligned(values.shape[dim]) - values.shape[dim]
    padding = (0, missing) if dim == -1 else (0, 0, 0, missing)
    return F.pad(values, padding) if missing else values  # [b, m, n′] or [b, m′, n]


def _vector_parts(values: Tensor, dim: int) -> Tensor:
    """Return the parts of vectors that :func:`matrix_parts` are multiplied by, in a new dimension: high, low, high."""
    return _parts(values, dim, is_vector=True)


def _parts(values: Tensor, dim: int, *, is_vector: bool) -> Tensor:
    """Return the three parts in a new dimension; the low one is last for matrices and in the middle for vectors."""
    shape = list(values.shape)
    shape.insert(dim, 3)
    parts = values.new_empty(shape, dtype=torch.bfloat16)
    by_part = parts.movedim(dim, 0)  # [3, ...]
    step, low = (2, 1) if is_vector else (1, 2)
    by_part[: step + 1 : step].copy_(values)  # both high parts, in one operation
    torch.sub(values, by_part[0], out=by_part[low])
    return parts


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Multiply bfloat16 matrices ``[b, m, k]`` and ``[b, k, n]`` with float32 sums, ``[b, m, n]``.

    ``bmm`` without ``out_dtype`` would round its sums to bfloat16. A CPU multiplies the numbers in float32, where the
    product of two bfloat16 numbers is exact.
    """
    if left.is_cuda:
        return torch.bmm(left, right, out_dtype=torch.float32)
    return torch.bmm(left.float(), right.float())
