"""Eigenbasis: chosen under exact damping, where ε is added to products of eigenvalues of the two factors.

A factor in any form is decomposed as dense blocks. One side's eigenbasis does not determine an inverse of that side;
``kronecker.KroneckerEigenbasis`` combines those of both sides.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kfac_sua.preconditioner.forms.inverse import FactorSizes, RefreshResult, Shape
from kfac_sua.preconditioner.forms.triangles import BlockMessage


@dataclass
class EigenBasis(RefreshResult):
    """Eigenvectors ``[num_blocks, d, d]``, in columns, and eigenvalues ``[num_blocks, d]``, clamped to ≥ 0.

    Reference: the Kronecker-factored eigenbasis, George et al. (2018), Sec. 3.
    """

    vectors: Tensor
    values: Tensor

    names: ClassVar[tuple[str, ...]] = ("vectors", "values")
    shapes: ClassVar[tuple[Shape, ...]] = (("b", "d", "d"), ("b", "d"))
    never_negative: ClassVar[tuple[str, ...]] = ("values",)

    @classmethod
    def zeros(cls, factor: FactorSizes) -> "EigenBasis":
        """Return a basis of zeros, to be sent where the decomposition of a factor failed."""
        values = factor.values.new_zeros(factor.num_blocks, factor.width)
        return cls(torch.diag_embed(values), values)  # [num_blocks, d, d], [num_blocks, d]

    def to(self, dtype: torch.dtype) -> "EigenBasis":
        """Return the basis in another precision."""
        return EigenBasis(self.vectors.to(dtype), self.values.to(dtype))

    @staticmethod
    def decomposition_flops(width: int) -> int:
        """FLOPs per block of eigenvalues and vectors, about 9 d³ (Golub & Van Loan, Sec. 8.3, symmetric QR)."""
        return 9 * width**3

    @staticmethod
    def application_flops(width: int, vectors: int) -> int:
        """FLOPs per block of rotating vectors into the basis and back."""
        return 4 * vectors * width**2

    @classmethod
    def flops_of(cls, factor: FactorSizes) -> int:
        """FLOPs per block of decomposing it."""
        return cls.decomposition_flops(factor.width)

    @classmethod
    def message_of(cls, factor: FactorSizes) -> BlockMessage:
        """Eigenvectors and eigenvalues."""
        return BlockMessage(factor.width, factor.width, is_triangle=False, num_extra=factor.width)

    def to_message(self) -> tuple[Tensor, Tensor]:
        """Return eigenvectors and eigenvalues."""
        return self.vectors, self.values

    @classmethod
    def from_message(cls, factor: FactorSizes, matrices: Tensor, extra: Tensor) -> "EigenBasis":
        """Take eigenvectors and eigenvalues."""
        del factor
        return cls(matrices, extra)


def decomposed(blocks: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return eigenvalues and eigenvectors of symmetric blocks, computed in float64 where their own precision fails.

    Args:
        blocks: ``[num_blocks, d, d]``.

    Returns:
        ``[num_blocks, d]`` and ``[num_blocks, d, d]`` in the blocks' precision; ``None`` if float64 does not converge.

    Reference: the symmetric eigenvalue problem, Golub & Van Loan, *Matrix Computations*, Ch. 8.
    """
    for dtype in (blocks.dtype, torch.float64):
        try:
            values, vectors = torch.linalg.eigh(blocks.to(dtype))
        except torch.linalg.LinAlgError:
            continue
        if bool(values.isfinite().all() & vectors.isfinite().all()):
            return values.to(blocks.dtype), vectors.to(blocks.dtype)
    return None
