"""The forms that a factor can be kept in, and what a refresh makes of each: one form, one file, one protocol.

| form | factor | what a refresh makes of it |
|---|---|---|
| dense | ``DenseFactor``, moments | ``DenseInverse`` |
| rows | ``RowsFactor``, few of them | ``LowRankInverse`` (Woodbury) |
| patches | ``PatchFactor``, rows that are never formed | ``PatchInverse`` (Woodbury) |
| eigenbasis | any of these, made dense | ``EigenBasis`` (exact damping) |
| split | – | ``SplitInverse``, ``SplitLowRankInverse``: of any inverse |

A new form is a file here and an entry in one of the two lists. Around the forms lies what they are made of: pixels
(``unfold``, ``patch_rows``), the rows and moments of a mini-batch (``moments``, ``correlations``), how these add up
over a step (``accumulator``), triangles, and the counted costs by which rows are kept or not (``cost``).
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol, TypeVar

from torch import Tensor

from kfac_sua.preconditioner.forms.dense import DenseFactor, DenseInverse
from kfac_sua.preconditioner.forms.eigen import EigenBasis
from kfac_sua.preconditioner.forms.form import (
    BlockMessage,
    Factor,
    Inverse,
    Kept,
    MadeInverse,
    Prepared,
    RowFactor,
    SumFactor,
)
from kfac_sua.preconditioner.forms.patches import PatchFactor, PatchInverse
from kfac_sua.preconditioner.forms.rows import LowRankInverse, RowsFactor
from kfac_sua.preconditioner.forms.split import SplitInverse, SplitLowRankInverse
from kfac_sua.preconditioner.geometry import LayerGeometry

SUM_FORMS: tuple[type[SumFactor], ...] = (DenseFactor,)
"""Forms of moments that add up, in the order in which they are asked whether they are chosen."""

ROW_FORMS: tuple[type[RowFactor], ...] = (PatchFactor, RowsFactor)
"""Forms of rows, in the order in which they are asked whether they can hold what was measured."""

INVERSE_FORMS: tuple[type[Inverse], ...] = (
    *(form.inverse_form for form in (*SUM_FORMS, *ROW_FORMS)),
    SplitInverse,
    SplitLowRankInverse,
)
"""Forms that an inverse can be kept in."""

NUM_DESCRIBED = 5
"""Integers of :func:`description_of`: a number and four sizes, which pixels need."""


def sum_form(width: int) -> type[SumFactor]:
    """Return the form that moments of blocks of this width are added up in."""
    return next(form for form in SUM_FORMS if form.is_chosen(width))


def description_of(factor: Factor) -> list[int]:
    """Return what other processes need to know of a factor's form, as :data:`NUM_DESCRIBED` integers.

    The number of its form and the sizes of the tensor that its rows are kept as; zeros for moments, whose form and
    sizes all processes know.
    """
    if factor.is_summed:
        return [0] * NUM_DESCRIBED
    sizes = list(factor.values.shape)
    return [factor.number, *sizes, *[0] * (NUM_DESCRIBED - 1 - len(sizes))]


def described_rows(description: Sequence[int]) -> tuple[type[RowFactor], tuple[int, ...]] | None:
    """Return the form and the sizes that :func:`description_of` told; ``None`` for moments."""
    number, *sizes = description
    if number == 0:
        return None
    form = next(form for form in ROW_FORMS if form.number == number)
    return form, tuple(sizes[: form.num_sizes])


class _Named(Protocol):
    names: ClassVar[tuple[str, ...]]


Kind = TypeVar("Kind", bound=_Named)


def form_of(state: Mapping[str, Any], forms: Sequence[type[Kind]]) -> type[Kind]:
    """Return the form whose names a checkpoint's entry has.

    Raises:
        ValueError: If there is none.
    """
    for form in forms:
        if set(form.names) == set(state):
            return form
    known = "; ".join(", ".join(form.names) for form in forms)
    raise ValueError(f"Preconditioner state has an entry of {', '.join(state) or 'nothing'}, expected one of: {known}.")


def factor_from_state(state: Mapping[str, Tensor], geometry: LayerGeometry) -> Factor:
    """Return the factor of a checkpoint's entry, of a layer of this geometry.

    Raises:
        ValueError: If it is the entry of no form.
    """
    form = form_of(state, (*SUM_FORMS, *ROW_FORMS))
    (values,) = state.values()
    return form.of(values, geometry)


def inverse_from_state(state: Mapping[str, Tensor], geometry: LayerGeometry) -> Inverse:
    """Return the inverse of a checkpoint's entry, of a layer of this geometry.

    Raises:
        ValueError: If it is the entry of no form.
    """
    return form_of(state, INVERSE_FORMS).from_tensors(state, geometry)


__all__ = [
    "INVERSE_FORMS",
    "NUM_DESCRIBED",
    "ROW_FORMS",
    "SUM_FORMS",
    "BlockMessage",
    "DenseFactor",
    "DenseInverse",
    "EigenBasis",
    "Factor",
    "Inverse",
    "Kept",
    "LowRankInverse",
    "MadeInverse",
    "PatchFactor",
    "PatchInverse",
    "Prepared",
    "RowFactor",
    "RowsFactor",
    "SplitInverse",
    "SplitLowRankInverse",
    "SumFactor",
    "described_rows",
    "description_of",
    "factor_from_state",
    "form_of",
    "inverse_from_state",
    "sum_form",
]
