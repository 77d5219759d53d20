"""Inverses and eigenbases of factors, in a few batched calls over the equal-sized blocks of all layers.

What is factorised, and what is made of the triangle, is up to the form of a factor (see ``forms``).
"""

from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from kfac_sua.preconditioner.forms import EigenBasis, Factor, MadeInverse
from kfac_sua.preconditioner.forms.dense import joined
from kfac_sua.preconditioner.forms.eigen import decomposed
from kfac_sua.preconditioner.precision import on_one_device

MAX_BATCHED_WIDTH = 1024
"""Wider matrices are factorised one by one: batching saves them nothing and would hold a copy of all of them."""

DAMPING_RAISES = (10, 100, 1000)
"""What the damping of a block is multiplied with, one after the other, until float64 can factorise it."""

T = TypeVar("T")
S = TypeVar("S")


@dataclass(frozen=True)
class Outcome(Generic[T]):
    """What was made of blocks that were to be inverted, and what became of them.

    Args:
        inverse: The inverse, of a factor or of a layer, or on the way to it the factorisation. Not to be used where
            blocks failed.
        num_failed: Blocks that could not be inverted.
        num_raised: Blocks that were inverted with more damping than was asked for.
        raised_by: The most that the damping of a block was multiplied with.
    """

    inverse: T
    num_failed: int = 0
    num_raised: int = 0
    raised_by: int = 1

    @classmethod
    def joined(cls, inverse: T, parts: "Sequence[Outcome[Any]]") -> "Outcome[T]":
        """Return the outcome of all parts together, with what was made of them."""
        return cls(
            inverse,
            sum(part.num_failed for part in parts),
            sum(part.num_raised for part in parts),
            max(part.raised_by for part in parts),
        )

    def with_inverse(self, inverse: S) -> "Outcome[S]":
        """Return the same, with something else made."""
        return Outcome.joined(inverse, [self])


@dataclass(frozen=True)
class _Factorisation:
    """Lower triangles of a factor's damped cores, and the damping in them, ``[num_blocks]``."""

    triangles: Tensor
    dampings: Tensor


class Inverter(Protocol):
    """What inverts the factors of a refresh: this module, or all processes together (``distributed.inversion``)."""

    def invert_factors(self, factors: Sequence[Factor], dampings: Sequence[Tensor]) -> list[Outcome[MadeInverse]]:
        """Invert ``factor + damping · I`` for many factors."""

    def eigendecompose_factors(self, factors: Sequence[Factor]) -> list[EigenBasis | None]:
        """Return the eigenbasis of every factor; ``None`` where the decomposition fails."""


def invert_factors(factors: Sequence[Factor], dampings: Sequence[Tensor]) -> list[Outcome[MadeInverse]]:
    """Invert ``factor + damping · I`` for many factors at once.

    All blocks to be factorised that have the same size, of whichever layer and side, go through one batched Cholesky
    call, except wide ones, which fill the device alone. A block that is not numerically positive definite in its own
    precision is tried again in float64, and then with more damping, of this block alone; what fails there too is
    reported, not hidden. One host synchronisation in all, unless a block fails.

    Args:
        factors: Factors to invert.
        dampings: For each, the damping of its blocks, ``[num_blocks]``, > 0.

    Returns:
        One outcome per factor, in order.
    """
    factorised = dict(enumerate(_factorise(factors, dampings)))
    results: dict[int, Outcome[MadeInverse]] = {}
    batches = _batches([(*_core_key(factor), type(factor)) for factor in factors])
    # Moments first: their batches are joined in a copy, beside which the roots of rows need not lie yet.
    for members in sorted(batches, key=lambda members: not factors[members[0]].is_summed):
        # A triangle may be as large as its inverse: none is held beyond this call.
        made = _inverted([factors[i] for i in members], [factorised.pop(i) for i in members])
        results |= dict(zip(members, made, strict=True))
    return [results[i] for i in range(len(factors))]


def eigendecompose_factors(factors: Sequence[Factor]) -> list[EigenBasis | None]:
    """Return the eigenbasis of every factor, equal-sized blocks in one batched call.

    A call that does not converge is repeated in float64, and then for each of its factors alone; where that does not
    converge either, ``None``.

    Args:
        factors: Factors to decompose, undamped.
    """
    blocks = [factor.dense() for factor in factors]
    bases: list[EigenBasis | None] = [None] * len(blocks)
    for members in _batches([_key(block.shape[-1], block) for block in blocks]):
        for i, basis in zip(members, _eigenbases([blocks[i] for i in members]), strict=True):
            bases[i] = basis
    return bases


def _inverted(factors: list[Factor], factorised: list[Outcome[_Factorisation]]) -> list[Outcome[MadeInverse]]:
    """Invert factors in one form, whose cores have one width, dtype and device."""
    triangles = [one.inverse.triangles for one in factorised]
    inverses = type(factors[0]).invert(factors, triangles, [one.inverse.dampings for one in factorised])
    return [one.with_inverse(inverse) for one, inverse in zip(factorised, inverses, strict=True)]


def _eigenbases(parts: list[Tensor]) -> list[EigenBasis | None]:
    """Return the eigenbases of equally wide blocks, together, or one by one if that fails."""
    result = decomposed(joined(parts))
    if result is None:
        return [None] if len(parts) == 1 else [basis for part in parts for basis in _eigenbases([part])]
    sizes = [len(part) for part in parts]
    values, vectors = (tensor.split(sizes) for tensor in result)  # [num_blocks, d], [num_blocks, d, d]
    return [EigenBasis(vector, value.clamp(min=0)) for value, vector in zip(values, vectors, strict=True)]


def _factorise(factors: Sequence[Factor], dampings: Sequence[Tensor]) -> list[Outcome[_Factorisation]]:
    """Factorise the damped cores, equal-sized ones together, and repair what fails."""
    results: dict[int, Outcome[_Factorisation]] = {}
    order, infos, sums = [], [], []
    for members in _batches([_core_key(factor) for factor in factors]):
        own_dampings = [dampings[i] for i in members]
        cores = _damped_cores([factors[i] for i in members], own_dampings)
        triangles, info = torch.linalg.cholesky_ex(cores)
        infos.append(info)
        sums.append(_diagonal_sums(triangles))
        order += members
        for i, part in zip(members, triangles.split([*map(len, own_dampings)]), strict=True):
            results[i] = Outcome(_Factorisation(part, dampings[i]))
    if not order:
        return []
    have_failed = _have_failed(torch.cat(on_one_device(infos)), torch.cat(on_one_device(sums)))
    lost = {i: lost for i, factor in enumerate(factors) if (lost := factor.loses_damping(dampings[i])) is not None}
    flags = torch.cat(on_one_device([have_failed, *lost.values()]))  # [blocks of all factors, and of rows once more]
    if bool(flags.any()):  # the only host synchronisation where all is well
        failed = dict(zip(order, have_failed.split([len(dampings[i]) for i in order]), strict=True))
        for i, factor in enumerate(factors):
            is_bad = failed[i].to(dampings[i].device) | lost.get(i, False)  # [blocks]
            if bool(is_bad.any()):
                indices = is_bad.nonzero().squeeze(-1)  # [blocks that failed]
                results[i] = _repaired(factor, results[i].inverse, indices)
    return [results[i] for i in range(len(factors))]


def _damped_cores(factors: Sequence[Factor], dampings: Sequence[Tensor]) -> Tensor:
    """Return new matrices to factorise, ``[blocks of all factors, core_width, core_width]``.

    The damped blocks, or the damped Gram matrices between rows.
    """
    cores = [factor.core() for factor in factors]
    batch = torch.cat(cores) if len(cores) > 1 or cores[0] is factors[0].values else cores[0]
    batch.diagonal(dim1=-2, dim2=-1).add_(joined(dampings)[:, None])
    return batch


def _diagonal_sums(triangles: Tensor) -> Tensor:
    """Return the sum of each triangle's diagonal: not finite if anything in the factorised matrix was not."""
    return triangles.diagonal(dim1=-2, dim2=-1).sum(-1)


def _have_failed(infos: Tensor, diagonal_sums: Tensor) -> Tensor:
    """Say of blocks whether their factorisation is of no use."""
    return (infos != 0) | ~diagonal_sums.isfinite()


def _repaired(factor: Factor, factorised: _Factorisation, failed: Tensor) -> Outcome[_Factorisation]:
    """Factorise failed blocks, given by their indices, once more: in float64, and then with more and more damping.

    In float64 a small damping is not lost on a large diagonal.
    """
    triangles, dampings = factorised.triangles.clone(), factorised.dampings.clone()
    num_raised, raised_by = 0, 1
    is_finite = bool(factor.traces().isfinite().all())  # or nothing helps
    for times in (1, *DAMPING_RAISES) if is_finite else ():
        dampings[failed] = factorised.dampings[failed] * times
        repaired, info = torch.linalg.cholesky_ex(
            _damped_cores([factor.in_float64(failed)], [dampings[failed].double()])
        )
        bad = _have_failed(info, _diagonal_sums(repaired))
        lost = factor.loses_damping(dampings)
        if lost is not None:
            bad |= lost[failed]
        triangles[failed] = repaired.to(triangles.dtype)
        num_cured = len(failed) - int(bad.sum())
        if times > 1 and num_cured:
            num_raised, raised_by = num_raised + num_cured, times
        failed = failed[bad]
        if not len(failed):
            break
    if len(failed):
        # What the factorisation left is of no use, and a zero on its diagonal would make cholesky_inverse raise.
        triangles[failed] = torch.eye(triangles.shape[-1]).to(triangles)
    return Outcome(_Factorisation(triangles, dampings), len(failed), num_raised, raised_by)


_Key = tuple[int, *tuple[Hashable, ...]]
"""Width first, and what else must be equal for matrices to go into one call."""


def _key(width: int, like: Tensor) -> _Key:
    return width, like.dtype, like.device


def _core_key(factor: Factor) -> _Key:
    return _key(factor.core_width, factor.values)


def _batches(keys: Sequence[_Key]) -> list[list[int]]:
    """Group positions whose matrices have equal keys; those of wide matrices stay alone."""
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for i, key in enumerate(keys):
        groups[key, i if key[0] > MAX_BATCHED_WIDTH else None].append(i)
    return list(groups.values())
