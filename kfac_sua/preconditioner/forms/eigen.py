"""Eigenbasis: chosen under exact damping, where ε is added to products of eigenvalues of the two factors.

A factor of any form is decomposed as dense blocks. Unlike an inverse, an eigenbasis says nothing of one side alone:
``kronecker.KroneckerEigenbasis`` joins two.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kfac_sua.preconditioner.forms.form import BlockMessage, Factor, Prepared, Shape


@dataclass
class EigenBasis(Prepared):
    """Eigenvectors ``[num_blocks, d, d]`` in columns and eigenvalues ``[num_blocks, d]``, clamped to ≥ 0."""

    vectors: Tensor
    values: Tensor

    names: ClassVar[tuple[str, ...]] = ("vectors", "values")
    shapes: ClassVar[tuple[Shape, ...]] = (("b", "d", "d"), ("b", "d"))
    never_negative: ClassVar[tuple[str, ...]] = ("values",)

    @classmethod
    def nothing(cls, factor: Factor) -> "EigenBasis":
        """Return zeros, which stand in where a decomposition failed."""
        values = factor.values.new_zeros(factor.num_blocks, factor.width)
        return cls(torch.diag_embed(values), values)

    def like(self, other: Tensor) -> "EigenBasis":
        """Return the basis in the precision of another tensor."""
        return EigenBasis(self.vectors.to(other.dtype), self.values.to(other.dtype))

    @staticmethod
    def decomposition_flops(width: int) -> int:
        """FLOPs per block of an eigendecomposition with vectors, about 9 d³ (Golub & Van Loan, symmetric QR)."""
        return 9 * width**3

    @staticmethod
    def application_flops(width: int, vectors: int) -> int:
        """FLOPs per block of rotating vectors into the basis and back."""
        return 4 * vectors * width**2

    @classmethod
    def flops_of(cls, factor: Factor) -> int:
        """FLOPs per block."""
        return cls.decomposition_flops(factor.width)

    @classmethod
    def message_of(cls, factor: Factor) -> BlockMessage:
        """Eigenvectors and eigenvalues."""
        return BlockMessage(factor.width, factor.width, is_triangle=False, num_extra=factor.width)

    def to_message(self) -> tuple[Tensor, Tensor]:
        """Return eigenvectors and eigenvalues."""
        return self.vectors, self.values

    @classmethod
    def from_message(cls, factor: Factor, matrices: Tensor, extra: Tensor) -> "EigenBasis":
        """Take eigenvectors and eigenvalues."""
        del factor
        return cls(matrices, extra)


def decomposed(blocks: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return eigenvalues and eigenvectors of symmetric blocks, in float64 where their own precision does not do.

    Args:
        blocks: ``[num_blocks, d, d]``.

    Returns:
        ``[num_blocks, d]`` and ``[num_blocks, d, d]`` in the blocks' precision; ``None`` if float64 does not converge.
    """
    for dtype in (blocks.dtype, torch.float64):
        try:
            values, vectors = torch.linalg.eigh(blocks.to(dtype))
        except torch.linalg.LinAlgError:
            continue
        if bool(values.isfinite().all() & vectors.isfinite().all()):
            return values.to(blocks.dtype), vectors.to(blocks.dtype)
    return None
