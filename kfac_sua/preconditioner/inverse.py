"""Inverses of damped factors, in a few batched calls over the equal-sized blocks of all layers.

Dense blocks are inverted by Cholesky factorisation. A factor kept as rows U (rank ≤ rows) is inverted by the Woodbury
identity, exactly: (UᵀU + λI)⁻¹ = (I − Uᵀ(LLᵀ)⁻¹U)/λ with LLᵀ = UUᵀ + λI. Where U are patches it is left at that, since
products with patches cost a fraction of products with a matrix of their size; otherwise V = L⁻¹U gives (I − VᵀV)/λ.
"""

from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kfac_sua.preconditioner.devices import on_one_device
from kfac_sua.preconditioner.factors import Factor
from kfac_sua.preconditioner.grouping import ChannelGroups
from kfac_sua.preconditioner.patch_rows import PatchRows

MAX_BATCHED_WIDTH = 1024
"""Wider matrices are factorised one by one: batching saves them nothing and would hold a copy of all of them."""

DAMPING_RAISES = (10, 100, 1000)
"""What the damping of a block is multiplied with, one after the other, until float64 can factorise it."""

MAX_READ_SHARE = 0.5
"""Share of the taps that may read a pixel for products tap by tap to beat one product with patches formed."""


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

    def right_of_patches(self, patches: PatchRows, groups: ChannelGroups) -> Tensor:
        """Multiply patches in channel groups from the right; ``[num_blocks, rows, d]``."""
        if patches.read_share > MAX_READ_SHARE:
            return self.right(patches.blocks(groups))
        return patches.multiply(self.blocks, groups)

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

    def right_of_patches(self, patches: PatchRows, groups: ChannelGroups) -> Tensor:
        """Multiply patches in channel groups from the right; ``[num_blocks, rows, d]``."""
        return self.right(patches.blocks(groups))

    def scale_(self, factor: float) -> None:
        """Multiply the inverse by a number, in place."""
        self.scale.mul_(factor)

    def tensors(self) -> dict[str, Tensor]:
        """Return what a checkpoint keeps."""
        return {"root": self.root, "scale": self.scale}


@dataclass
class PatchInverse:
    """scale · (I − Uᵀ (L Lᵀ)⁻¹ U), with U the patches of a mini-batch: the Woodbury form that never forms U.

    Args:
        patches: U, of one block.
        triangle: L, ``[1, rows, rows]``, lower triangle.
        scale: ``[1, 1, 1]``.
    """

    patches: PatchRows
    triangle: Tensor
    scale: Tensor

    def left(self, values: Tensor) -> Tensor:
        """Multiply ``[1, d, n]`` from the left."""
        return self.right(values.mT).mT

    def right(self, values: Tensor) -> Tensor:
        """Multiply ``[1, n, d]`` from the right."""
        vectors = values[0].clone(memory_format=torch.contiguous_format)
        return self._project_out_(vectors, self.patches.times(vectors))

    def right_of_patches(self, patches: PatchRows, groups: ChannelGroups) -> Tensor:
        """Multiply patches from the right, as one group; ``[1, rows, d]``."""
        if patches.pixels.shape[:2] != self.patches.pixels.shape[:2]:
            return self.right(patches.blocks(groups))
        return self._project_out_(patches.rows(), patches.cross(self.patches))

    def _project_out_(self, vectors: Tensor, products: Tensor) -> Tensor:
        """Turn V ``[n, d]`` into scale · (V − P (L Lᵀ)⁻¹ U), with products P = V Uᵀ ``[n, rows]``; ``[1, n, d]``."""
        coefficients = torch.cholesky_solve(products.mT, self.triangle[0]).mT
        return self.patches.subtract_combination_(vectors, coefficients).mul_(self.scale[0])[None]

    def scale_(self, factor: float) -> None:
        """Multiply the inverse by a number, in place."""
        self.scale.mul_(factor)

    def tensors(self) -> dict[str, Tensor]:
        """Return what a checkpoint keeps."""
        return {"pixels": self.patches.pixels, "triangle": self.triangle, "scale": self.scale}


@dataclass
class EigenBasis:
    """Eigenvectors ``[num_blocks, d, d]`` in columns and eigenvalues ``[num_blocks, d]``, clamped to ≥ 0."""

    vectors: Tensor
    values: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """Return what a checkpoint keeps."""
        return {"vectors": self.vectors, "values": self.values}


Inverse = DenseInverse | LowRankInverse | PatchInverse


@dataclass
class InverseResult:
    """An inverse, and what became of its blocks.

    Args:
        inverse: The inverse, not to be used where blocks failed.
        num_failed: Blocks that could not be inverted.
        num_raised: Blocks that were inverted with more damping than was asked for.
        raised_by: The most that the damping of a block was multiplied with.
    """

    inverse: Inverse
    num_failed: int = 0
    num_raised: int = 0
    raised_by: int = 1


@dataclass
class _Factorisation:
    """Lower triangles of a factor's damped cores, the damping in them, ``[num_blocks]``, and as in InverseResult."""

    triangles: Tensor
    dampings: Tensor
    num_failed: int = 0
    num_raised: int = 0
    raised_by: int = 1


def invert_factors(factors: Sequence[Factor], dampings: Sequence[Tensor]) -> list[InverseResult]:
    """Invert ``factor + damping · I`` for many factors at once.

    All blocks to be factorised that have the same size, of whichever layer and side, go through one batched Cholesky
    call, except wide ones, which fill the device alone. A block that is not numerically positive definite in its own
    precision is tried again in float64, and then with more damping, of this block alone; what fails there too is
    reported, not hidden. One host synchronisation in all, unless a block fails.

    Args:
        factors: Factors to invert.
        dampings: For each, the damping of its blocks, ``[num_blocks]``, > 0.

    Returns:
        One result per factor, in order.
    """
    factorised = _factorise(factors, dampings)
    inverses: list[Inverse | None] = [None] * len(factors)
    dense = [i for i, factor in enumerate(factors) if factor.blocks is not None]
    for members in _batches(dense, [one.triangles for one in factorised]):
        batch = torch.cholesky_inverse(_joined([factorised[i].triangles for i in members]))
        for i, part in zip(members, batch.split([len(dampings[i]) for i in members]), strict=True):
            inverses[i] = DenseInverse(part)
            factorised[i].triangles = part[:0]  # a triangle is as large as its inverse: let go of it
    return [
        InverseResult(
            _woodbury(factor, one) if inverse is None else inverse, one.num_failed, one.num_raised, one.raised_by
        )
        for factor, one, inverse in zip(factors, factorised, inverses, strict=True)
    ]


def eigendecompose_factors(factors: Sequence[Factor]) -> list[EigenBasis | None]:
    """Return the eigenbasis of every factor, equal-sized blocks in one batched call.

    A call that does not converge is repeated in float64, and then for each of its factors alone; where that does not
    converge either, ``None``.
    """
    blocks = [factor.dense() for factor in factors]
    bases: list[EigenBasis | None] = [None] * len(blocks)
    for members in _batches(range(len(blocks)), blocks):
        for i, basis in zip(members, _eigenbases([blocks[i] for i in members]), strict=True):
            bases[i] = basis
    return bases


def _eigenbases(parts: list[Tensor]) -> list[EigenBasis | None]:
    """Return the eigenbases of equally wide blocks, together, or one by one if that fails."""
    decomposed = _eigh(_joined(parts))
    if decomposed is None:
        return [None] if len(parts) == 1 else [basis for part in parts for basis in _eigenbases([part])]
    sizes = [len(part) for part in parts]
    values, vectors = (tensor.split(sizes) for tensor in decomposed)
    return [EigenBasis(vector, value.clamp(min=0)) for value, vector in zip(values, vectors, strict=True)]


def _woodbury(factor: Factor, factorised: _Factorisation) -> Inverse:
    scale = factorised.dampings.reciprocal()[:, None, None]
    if factor.patches is not None:
        return PatchInverse(factor.patches, factorised.triangles, scale)
    return LowRankInverse(torch.linalg.solve_triangular(factorised.triangles, factor.values, upper=False), scale)


def _damped_core(factor: Factor, damping: Tensor) -> Tensor:
    """Return the matrix to factorise: the damped blocks, or the damped Gram matrix between rows."""
    core = factor.core()
    core.diagonal(dim1=-2, dim2=-1).add_(damping[:, None])
    return core


def _factorise(factors: Sequence[Factor], dampings: Sequence[Tensor]) -> list[_Factorisation]:
    """Factorise the damped cores, equal-sized ones together, and repair what fails."""
    results = [_Factorisation(torch.empty(0), damping) for damping in dampings]
    failed = [torch.empty(0)] * len(factors)
    for members in _batches(range(len(factors)), factors):
        triangles, bad = _cholesky(_joined([_damped_core(factors[i], dampings[i]) for i in members]))
        sizes = [len(dampings[i]) for i in members]
        for i, part, part_bad in zip(members, triangles.split(sizes), bad.split(sizes), strict=True):
            results[i].triangles, failed[i] = part, part_bad | _is_lost(factors[i], dampings[i])
    if bool(torch.cat(on_one_device(failed)).any()):  # the only host synchronisation where all is well
        for i, bad in enumerate(failed):
            if bool(bad.any()):
                results[i] = _repaired(factors[i], results[i], bad.nonzero().squeeze(-1))
    return results


def _cholesky(batch: Tensor) -> tuple[Tensor, Tensor]:
    """Return the lower triangles of a batch and whether each failed."""
    triangle, info = torch.linalg.cholesky_ex(batch)
    return triangle, (info != 0) | ~triangle.diagonal(dim1=-2, dim2=-1).isfinite().all(-1)


def _repaired(factor: Factor, factorised: _Factorisation, failed: Tensor) -> _Factorisation:
    """Factorise failed blocks, given by their indices, once more: in float64, and then with more and more damping.

    In float64 a small damping is not lost on a large diagonal.
    """
    result = _Factorisation(factorised.triangles.clone(), factorised.dampings.clone())
    for times in (1, *DAMPING_RAISES):
        result.dampings[failed] = factorised.dampings[failed] * times
        core = _damped_core(factor.in_float64(failed), result.dampings[failed].double())
        triangles, bad = _cholesky(core)
        bad |= _is_lost(factor, result.dampings)[failed]
        result.triangles[failed] = triangles.to(result.triangles.dtype)
        num_cured = len(failed) - int(bad.sum())
        if times > 1 and num_cured:
            result.num_raised, result.raised_by = result.num_raised + num_cured, times
        failed = failed[bad]
        if not len(failed):
            return result
    result.num_failed = len(failed)
    # What the factorisation left is of no use, and a zero on its diagonal would make cholesky_inverse raise.
    result.triangles[failed] = torch.eye(result.triangles.shape[-1]).to(result.triangles)
    return result


def _is_lost(factor: Factor, damping: Tensor) -> Tensor:
    """Whether a damping is below the rounding of I − VᵀV, whose error the Woodbury form divides by it."""
    if factor.blocks is not None:
        return torch.zeros_like(damping, dtype=torch.bool)
    return damping < torch.finfo(damping.dtype).eps * factor.traces()


def _eigh(batch: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return eigenvalues and eigenvectors of a batch, in its own precision; ``None`` if they do not converge."""
    for dtype in (batch.dtype, torch.float64):
        try:
            values, vectors = torch.linalg.eigh(batch.to(dtype))
        except torch.linalg.LinAlgError:
            continue
        if bool(values.isfinite().all() & vectors.isfinite().all()):
            return values.to(batch.dtype), vectors.to(batch.dtype)
    return None


def _batches(positions: Iterable[int], matrices: Sequence[Tensor] | Sequence[Factor]) -> list[list[int]]:
    """Group positions whose matrices have equal width, dtype and device; those of wide matrices stay alone."""
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for i in positions:
        matrix = matrices[i]
        width = matrix.core_width if isinstance(matrix, Factor) else matrix.shape[-1]
        values = matrix.values if isinstance(matrix, Factor) else matrix
        groups[width, values.dtype, values.device, i if width > MAX_BATCHED_WIDTH else None].append(i)
    return list(groups.values())


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
