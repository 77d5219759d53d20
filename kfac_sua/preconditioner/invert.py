"""Inverses and eigenbases of factors, in a few batched calls over the equal-sized blocks of all layers.

The form of a factor decides which matrix is factorised, and what is computed from the triangle (see ``forms``).
"""

from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from kfac_sua.preconditioner.forms import ComputedInverse, EigenBasis, Factor
from kfac_sua.preconditioner.forms.dense import concatenated
from kfac_sua.preconditioner.forms.eigen import decomposed
from kfac_sua.preconditioner.precision import on_one_device

MAX_BATCHED_WIDTH = 1024
"""Wider matrices are factorised one by one: batching them saves no time, and would hold a copy of all of them."""

DAMPING_RAISES = (10, 100, 1000)
"""Multiples of a block's damping that are tried, one after the other, until float64 can factorise it: few, as each
costs a factorisation; beyond them a layer keeps its last inverse."""

T = TypeVar("T")
S = TypeVar("S")


@dataclass(frozen=True)
class Outcome(Generic[T]):
    """The result of inverting blocks, and how many of them failed or needed more damping.

    Args:
        inverse: The inverse of a factor or of a layer, or the factorisation it is computed from. Not to be used where
            blocks failed.
        num_failed: Blocks that could not be inverted.
        num_raised: Blocks that were inverted with more damping than was asked for.
        raised_by: The largest multiple of its damping that a block was inverted with.
    """

    inverse: T
    num_failed: int = 0
    num_raised: int = 0
    raised_by: int = 1

    @classmethod
    def combined(cls, inverse: T, parts: "Sequence[Outcome[Any]]") -> "Outcome[T]":
        """Return the outcome of all parts together, with the result that was computed from them."""
        return cls(
            inverse,
            sum(part.num_failed for part in parts),
            sum(part.num_raised for part in parts),
            max(part.raised_by for part in parts),
        )

    def with_inverse(self, inverse: S) -> "Outcome[S]":
        """Return the same outcome with another result."""
        return Outcome.combined(inverse, [self])


@dataclass(frozen=True)
class _Factorisation:
    """Lower triangles of a factor's damped cores, and the damping in them, ``[num_blocks]``."""

    triangles: Tensor
    dampings: Tensor


class Inverter(Protocol):
    """Inverts the factors of a refresh: this module, or all processes together (``distributed.inversion``)."""

    def invert_factors(self, factors: Sequence[Factor], dampings: Sequence[Tensor]) -> list[Outcome[ComputedInverse]]:
        """Invert ``factor + damping · I`` for many factors, as :func:`invert_factors` does."""

    def eigendecompose_factors(self, factors: Sequence[Factor]) -> list[EigenBasis | None]:
        """Return the eigenbasis of every factor; ``None`` where the decomposition fails."""


def invert_factors(factors: Sequence[Factor], dampings: Sequence[Tensor]) -> list[Outcome[ComputedInverse]]:
    """Invert ``factor + damping · I`` for many factors at once.

    All matrices of one size, from all layers and both sides, are factorised in one batched Cholesky call, except wide
    ones, each of which keeps the device busy. A block that is not numerically positive definite in its own precision is
    tried again in float64, and then with more damping for this block only; blocks that fail nevertheless are counted in
    the outcome. There is one host synchronisation in all, unless a block fails.

    Reference: damped factors: Martens & Grosse (2015), Sec. 6.3; Cholesky: Golub & Van Loan, *Matrix Computations*,
    Sec. 4.2; factors kept as rows by the Woodbury identity (see ``forms.rows``).

    Args:
        factors: Factors to invert.
        dampings: For each, the damping of its blocks, ``[num_blocks]``, > 0.

    Returns:
        One outcome per factor, in order.
    """
    factorised = dict(enumerate(_factorise(factors, dampings)))
    results: dict[int, Outcome[ComputedInverse]] = {}
    batches = _batches([(*_core_key(factor), type(factor)) for factor in factors])
    # Moments first: their batches are copied into one tensor, while the roots of rows take no memory yet.
    for members in sorted(batches, key=lambda members: not factors[members[0]].is_moment):
        # A triangle may be as large as its inverse: popping it frees it after this call.
        computed = _inverted([factors[i] for i in members], [factorised.pop(i) for i in members])
        results |= dict(zip(members, computed, strict=True))
    return [results[i] for i in range(len(factors))]


def eigendecompose_factors(factors: Sequence[Factor]) -> list[EigenBasis | None]:
    """Return the eigenbasis of every factor, equal-sized blocks in one batched call.

    A call that does not converge is repeated in float64, and then for each of its factors alone; the result is ``None``
    for a factor where that does not converge either.

    Reference: George et al. (2018); the symmetric eigenvalue problem, Golub & Van Loan, *Matrix Computations*, Ch. 8.

    Args:
        factors: Factors to decompose, without damping.
    """
    blocks = [factor.dense() for factor in factors]
    bases: list[EigenBasis | None] = [None] * len(blocks)
    for members in _batches([(block.shape[-1], block.dtype, block.device) for block in blocks]):
        for i, basis in zip(members, _eigenbases([blocks[i] for i in members]), strict=True):
            bases[i] = basis
    return bases


def _inverted(factors: list[Factor], factorised: list[Outcome[_Factorisation]]) -> list[Outcome[ComputedInverse]]:
    """Invert factors in one form whose cores have the same width, dtype and device."""
    triangles = [one.inverse.triangles for one in factorised]
    inverses = type(factors[0]).invert(factors, triangles, [one.inverse.dampings for one in factorised])
    return [one.with_inverse(inverse) for one, inverse in zip(factorised, inverses, strict=True)]


def _eigenbases(parts: list[Tensor]) -> list[EigenBasis | None]:
    """Return the eigenbases of equally wide blocks, all in one call, or one by one if that fails."""
    result = decomposed(concatenated(parts))
    if result is None:
        return [None] if len(parts) == 1 else [basis for part in parts for basis in _eigenbases([part])]
    sizes = [len(part) for part in parts]
    values, vectors = (tensor.split(sizes) for tensor in result)  # [num_blocks, d], [num_blocks, d, d] each
    return [EigenBasis(vector, value.clamp(min=0)) for value, vector in zip(values, vectors, strict=True)]


def _factorise(factors: Sequence[Factor], dampings: Sequence[Tensor]) -> list[Outcome[_Factorisation]]:
    """Factorise the damped cores, equal-sized ones in one call, and repair those that fail."""
    results: dict[int, Outcome[_Factorisation]] = {}
    order, infos, sums = [], [], []
    for members in _batches([_core_key(factor) for factor in factors]):
        own_dampings = [dampings[i] for i in members]
        cores = _damped_cores([factors[i] for i in members], own_dampings)
        triangles, info = torch.linalg.cholesky_ex(cores)
        infos.append(info)
        sums.append(_diagonal_sums(triangles))
        order += members
        parts = triangles.split([*map(len, own_dampings)])  # [num_blocks, core_width, core_width] each
        for i, part in zip(members, parts, strict=True):
            results[i] = Outcome(_Factorisation(part, dampings[i]))
    if not order:
        return []
    info, diagonal_sums = (torch.cat(on_one_device(parts)) for parts in (infos, sums))  # [blocks of all factors] each
    have_failed = _have_failed(info, diagonal_sums)
    lost = {i: lost for i, factor in enumerate(factors) if (lost := factor.loses_damping(dampings[i])) is not None}
    flags = torch.cat(on_one_device([have_failed, *lost.values()]))  # [blocks of all factors, and again those of rows]
    if bool(flags.any()):  # the only host synchronisation where no block fails
        by_factor = have_failed.split([len(dampings[i]) for i in order])  # [blocks] each
        failed = dict(zip(order, by_factor, strict=True))
        for i, factor in enumerate(factors):
            is_bad = failed[i].to(dampings[i].device) | lost.get(i, False)  # [blocks]
            if bool(is_bad.any()):
                indices = is_bad.nonzero().squeeze(-1)  # [blocks that failed]
                results[i] = _repaired(factor, results[i].inverse, indices)
    return [results[i] for i in range(len(factors))]


def _damped_cores(factors: Sequence[Factor], dampings: Sequence[Tensor]) -> Tensor:
    """Return new matrices to factorise, ``[blocks of all factors, core_width, core_width]``.

    They are the damped blocks, or the damped matrices U Uᵀ + λI of rows.
    """
    cores = [factor.core() for factor in factors]
    is_own = len(cores) == 1 and cores[0] is not factors[0].values  # nobody else uses it
    batch = cores[0] if is_own else torch.cat(cores)  # [blocks of all factors, core_width, core_width]
    batch.diagonal(dim1=-2, dim2=-1).add_(concatenated(dampings)[:, None])  # [blocks, 1] to [blocks, core_width]
    return batch


def _diagonal_sums(triangles: Tensor) -> Tensor:
    """Return the sum of each triangle's diagonal, ``[blocks]``: not finite if the factorised matrix was not."""
    return triangles.diagonal(dim1=-2, dim2=-1).sum(-1)


def _have_failed(infos: Tensor, diagonal_sums: Tensor) -> Tensor:
    """Return whether the factorisation of each block failed, ``[blocks]``."""
    return (infos != 0) | ~diagonal_sums.isfinite()


def _repaired(factor: Factor, factorised: _Factorisation, failed: Tensor) -> Outcome[_Factorisation]:
    """Factorise the failed blocks, given by their indices, again: in float64, and then with more and more damping.

    In float64 a small damping is not rounded away beside a large diagonal.
    """
    triangles, dampings = factorised.triangles.clone(), factorised.dampings.clone()
    num_raised, raised_by = 0, 1
    is_finite = bool(factor.traces().isfinite().all())  # otherwise no damping helps
    for multiple in (1, *DAMPING_RAISES) if is_finite else ():
        dampings[failed] = factorised.dampings[failed] * multiple
        repaired, info = torch.linalg.cholesky_ex(
            _damped_cores([factor.in_float64(failed)], [dampings[failed].double()])
        )
        bad = _have_failed(info, _diagonal_sums(repaired))
        lost = factor.loses_damping(dampings)
        if lost is not None:
            bad |= lost[failed]
        triangles[failed] = repaired.to(triangles.dtype)
        num_cured = len(failed) - int(bad.sum())
        if multiple > 1 and num_cured:
            num_raised, raised_by = num_raised + num_cured, multiple
        failed = failed[bad]
        if not len(failed):
            break
    if len(failed):
        # A failed factorisation may leave zeros on the diagonal, on which cholesky_inverse raises.
        triangles[failed] = torch.eye(triangles.shape[-1]).to(triangles)
    return Outcome(_Factorisation(triangles, dampings), len(failed), num_raised, raised_by)


_Key = tuple[int, *tuple[Hashable, ...]]
"""Properties that must be equal for matrices to go into one call, the width first."""


def _core_key(factor: Factor) -> _Key:
    return factor.core_width, factor.values.dtype, factor.values.device


def _batches(keys: Sequence[_Key]) -> list[list[int]]:
    """Return the positions of matrices, grouped by equal keys; a wide matrix is a group of its own."""
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for i, key in enumerate(keys):
        groups[key, i if key[0] > MAX_BATCHED_WIDTH else None].append(i)
    return list(groups.values())
