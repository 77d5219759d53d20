"""Inverses of damped factors, in a few batched calls over the equal-sized blocks of all layers.

Dense blocks are inverted by Cholesky factorisation. A factor kept as rows U (rank ≤ rows) is inverted by the Woodbury
identity, exactly: (UᵀU + λI)⁻¹ = (I − VᵀV)/λ with V = L⁻¹U and LLᵀ = UUᵀ + λI.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kfac_sua.preconditioner.factors import Factor


@dataclass
class DenseInverse:
    """Inverse blocks, symmetric, ``[num_blocks, d, d]``."""

    blocks: Tensor

    def left(self, values: Tensor) -> Tensor:
        """Multiply ``[num_blocks, d, n]`` from the left."""
        return torch.bmm(self.blocks, values)

    def right(self, values: Tensor) -> Tensor:
        """Multiply ``[num_blocks, n, d]`` from the right."""
        return torch.bmm(values, self.blocks)

    def scale_(self, factor: float) -> None:
        """Multiply the inverse by a number, in place."""
        self.blocks.mul_(factor)

    def tensors(self) -> dict[str, Tensor]:
        """Return what a checkpoint keeps."""
        return {"blocks": self.blocks}


@dataclass
class LowRankInverse:
    """scale · (I − rootᵀ root), with ``root`` ``[num_blocks, rows, d]`` and ``scale`` ``[num_blocks, 1, 1]``."""

    root: Tensor
    scale: Tensor

    def left(self, values: Tensor) -> Tensor:
        """Multiply ``[num_blocks, d, n]`` from the left."""
        return torch.baddbmm(values, self.root.mT, torch.bmm(self.root, values), alpha=-1).mul_(self.scale)

    def right(self, values: Tensor) -> Tensor:
        """Multiply ``[num_blocks, n, d]`` from the right."""
        return torch.baddbmm(values, torch.bmm(values, self.root.mT), self.root, alpha=-1).mul_(self.scale)

    def scale_(self, factor: float) -> None:
        """Multiply the inverse by a number, in place."""
        self.scale.mul_(factor)

    def tensors(self) -> dict[str, Tensor]:
        """Return what a checkpoint keeps."""
        return {"root": self.root, "scale": self.scale}


@dataclass
class EigenBasis:
    """Eigenvectors ``[num_blocks, d, d]`` in columns and eigenvalues ``[num_blocks, d]``, clamped to ≥ 0."""

    vectors: Tensor
    values: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """Return what a checkpoint keeps."""
        return {"vectors": self.vectors, "values": self.values}


Inverse = DenseInverse | LowRankInverse


@dataclass
class InverseResult:
    """An inverse, and how many of its blocks failed and must not be used."""

    inverse: Inverse
    num_failed: int


def invert_factors(factors: Sequence[Factor], dampings: Sequence[Tensor]) -> list[InverseResult]:
    """Invert ``factor + damping · I`` for many factors at once.

    All blocks to be factorised that have the same size, of whichever layer and side, go through one batched Cholesky
    call. A block that is not numerically positive definite in its own precision is tried again in float64; what fails
    there too is reported, not hidden. One host synchronisation in all.

    Args:
        factors: Factors to invert.
        dampings: For each, the damping of its blocks, ``[num_blocks]``, > 0.

    Returns:
        One result per factor, in order.
    """
    triangles, num_failed = _damped_triangles(factors, dampings)
    dense = [i for i, factor in enumerate(factors) if factor.blocks is not None]
    inverses = dict(zip(dense, _batched_cholesky_inverse([triangles[i] for i in dense]), strict=True))
    results = []
    for i, (factor, damping) in enumerate(zip(factors, dampings, strict=True)):
        if i in inverses:
            results.append(InverseResult(DenseInverse(inverses[i]), num_failed[i]))
        else:
            root = torch.linalg.solve_triangular(triangles[i], factor.values, upper=False)
            scale = damping.reciprocal()[:, None, None]
            results.append(InverseResult(LowRankInverse(root, scale), num_failed[i]))
    return results


def eigendecompose_factors(factors: Sequence[Factor]) -> list[EigenBasis | None]:
    """Return the eigenbasis of every factor, equal-sized blocks in one batched call.

    A call that does not converge is repeated in float64; where that does not converge either, ``None``.
    """
    blocks = [factor.dense() for factor in factors]
    bases: list[EigenBasis | None] = [None] * len(blocks)
    for members, batch in _by_size(blocks):
        decomposed = _eigh(batch)
        if decomposed is None:
            continue
        values, vectors = decomposed
        sizes = [blocks[i].shape[0] for i in members]
        for i, value, vector in zip(members, values.split(sizes), vectors.split(sizes), strict=True):
            bases[i] = EigenBasis(vector, value.clamp(min=0))
    return bases


def _damped_core(factor: Factor, damping: Tensor) -> Tensor:
    """Return the matrix to factorise: the damped blocks, or the damped Gram matrix between rows."""
    core = factor.blocks.clone() if factor.blocks is not None else factor.values @ factor.values.mT
    core.diagonal(dim1=-2, dim2=-1).add_(damping[:, None])
    return core


def _damped_triangles(factors: Sequence[Factor], dampings: Sequence[Tensor]) -> tuple[list[Tensor], list[int]]:
    """Return lower triangles of the damped cores and, per factor, how many blocks failed in float64 too."""
    cores = [_damped_core(factor, damping) for factor, damping in zip(factors, dampings, strict=True)]
    triangles: list[Tensor] = [torch.empty(0)] * len(cores)
    failed: list[Tensor] = [torch.empty(0)] * len(cores)
    for members, batch in _by_size(cores):
        triangle, bad = _cholesky(batch)
        sizes = [cores[i].shape[0] for i in members]
        for i, part, part_bad in zip(members, triangle.split(sizes), bad.split(sizes), strict=True):
            triangles[i], failed[i] = part, part_bad
    lost = [_is_lost(factor, damping) for factor, damping in zip(factors, dampings, strict=True)]
    failed = [bad | is_lost for bad, is_lost in zip(failed, lost, strict=True)]
    num_failed = [0] * len(cores)
    if bool(torch.cat(failed).any()):  # the only host synchronisation where all is well
        for i, (factor, damping) in enumerate(zip(factors, dampings, strict=True)):
            triangles[i], num_failed[i] = _retry_in_float64(factor, damping, triangles[i], failed[i])
    return triangles, num_failed


def _cholesky(batch: Tensor) -> tuple[Tensor, Tensor]:
    """Return the lower triangles of a batch and whether each failed."""
    triangle, info = torch.linalg.cholesky_ex(batch)
    return triangle, (info != 0) | ~triangle.diagonal(dim1=-2, dim2=-1).isfinite().all(-1)


def _retry_in_float64(factor: Factor, damping: Tensor, triangle: Tensor, failed: Tensor) -> tuple[Tensor, int]:
    """Factorise the failed blocks again, damped in float64, where a small damping is not lost on a large diagonal."""
    indices = failed.nonzero().squeeze(-1)
    values = factor.values[indices].double()
    selected = Factor(blocks=values) if factor.blocks is not None else Factor(rows=values)
    repaired, still_failed = _cholesky(_damped_core(selected, damping[indices].double()))
    triangle = triangle.clone()
    triangle[indices] = repaired.to(triangle.dtype)
    return triangle, int((still_failed | _is_lost(factor, damping)[indices]).sum())


def _is_lost(factor: Factor, damping: Tensor) -> Tensor:
    """Whether a damping is below the rounding of I − VᵀV, whose error the Woodbury form divides by it."""
    if factor.rows is None:
        return torch.zeros_like(damping, dtype=torch.bool)
    return damping < torch.finfo(damping.dtype).eps * factor.traces()


def _batched_cholesky_inverse(triangles: Sequence[Tensor]) -> list[Tensor]:
    inverses: list[Tensor] = [torch.empty(0)] * len(triangles)
    for members, batch in _by_size(triangles):
        inverse = torch.cholesky_inverse(batch)
        for i, part in zip(members, inverse.split([triangles[i].shape[0] for i in members]), strict=True):
            inverses[i] = part
    return inverses


def _eigh(batch: Tensor) -> tuple[Tensor, Tensor] | None:
    for dtype in (batch.dtype, torch.float64):
        try:
            values, vectors = torch.linalg.eigh(batch.to(dtype))
        except torch.linalg.LinAlgError:
            continue
        return values.to(batch.dtype), vectors.to(batch.dtype)
    return None


def _by_size(matrices: Sequence[Tensor]) -> list[tuple[list[int], Tensor]]:
    """Group ``[blocks, d, d]`` tensors of equal d, dtype and device into one batch each, with their positions."""
    groups: dict[tuple[int, torch.dtype, torch.device], list[int]] = defaultdict(list)
    for i, matrix in enumerate(matrices):
        groups[matrix.shape[-1], matrix.dtype, matrix.device].append(i)
    return [
        (members, matrices[members[0]] if len(members) == 1 else torch.cat([matrices[i] for i in members]))
        for members in groups.values()
    ]
