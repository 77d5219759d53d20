"""The forms that a factor is kept in, and what a refresh computes from each: one file per form.

| form | factor | what a refresh computes from it |
|---|---|---|
| dense | ``DenseFactor``, moments | ``DenseInverse`` |
| rows | ``RowsFactor``, few rows | ``LowRankInverse`` (Woodbury) |
| patches | ``PatchFactor``, rows that are not formed | ``PatchInverse`` (Woodbury) |
| eigenbasis | any of these, made dense | ``EigenBasis`` (exact damping) |
| split | – | ``SplitInverse``, ``SplitLowRankInverse``: from the inverses above |

Every form implements the protocols in ``factor`` and ``inverse``; a new form is a file here and an entry in one of the
two lists below. The other files: reading pixels (``unfold``, ``patch_rows``), the rows and moments of a mini-batch
(``moments``, ``correlations``), their sum over a step (``accumulator``), what processes send (``triangles``), and the
costs that decide between forms (``cost``, ``rates``).
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol, TypeVar

from torch import Tensor

from kfac_sua.preconditioner.forms.dense import DenseFactor, DenseInverse
from kfac_sua.preconditioner.forms.eigen import EigenBasis
from kfac_sua.preconditioner.forms.factor import Factor, LowRankFactor, MomentFactor
from kfac_sua.preconditioner.forms.inverse import ComputedInverse, Inverse, NamedTensors, RefreshResult
from kfac_sua.preconditioner.forms.patches import PatchFactor, PatchInverse
from kfac_sua.preconditioner.forms.rows import LowRankInverse, RowsFactor
from kfac_sua.preconditioner.forms.split import SplitInverse, SplitLowRankInverse
from kfac_sua.preconditioner.forms.triangles import BlockMessage
from kfac_sua.preconditioner.geometry import LayerGeometry

MOMENT_FORMS: tuple[type[MomentFactor], ...] = (DenseFactor,)
"""Forms of moments, in the order in which :func:`moment_form` asks them whether they are chosen."""

LOW_RANK_FORMS: tuple[type[LowRankFactor], ...] = (PatchFactor, RowsFactor)
"""Forms of rows, in the order in which an accumulator asks them whether they can hold what was measured."""

INVERSE_FORMS: tuple[type[Inverse], ...] = (
    *(form.inverse_form for form in (*MOMENT_FORMS, *LOW_RANK_FORMS)),
    SplitInverse,
    SplitLowRankInverse,
)
"""Forms that an inverse can be kept in."""

NUM_DESCRIBED = 5
"""Integers that :func:`description_of` returns: the number of a form and four sizes, as pixels have four dimensions."""


def moment_form(width: int) -> type[MomentFactor]:
    """Return the form in which moments of blocks of this width are added up."""
    return next(form for form in MOMENT_FORMS if form.is_chosen(width))


def description_of(factor: Factor) -> list[int]:
    """Return what other processes need to know about a factor's form, as :data:`NUM_DESCRIBED` integers.

    These are the number of the form and the sizes of the tensor that the rows are stored as; zeros for moments, as all
    processes know their form and sizes.
    """
    if factor.is_moment:
        return [0] * NUM_DESCRIBED
    sizes = list(factor.values.shape)
    return [factor.number, *sizes, *[0] * (NUM_DESCRIBED - 1 - len(sizes))]


def described_rows(description: Sequence[int]) -> tuple[type[LowRankFactor], tuple[int, ...]] | None:
    """Return the form and the sizes from what :func:`description_of` returned; ``None`` for moments."""
    number, *sizes = description
    if number == 0:
        return None
    form = next(form for form in LOW_RANK_FORMS if form.number == number)
    return form, tuple(sizes[: form.num_sizes])


class _Named(Protocol):
    names: ClassVar[tuple[str, ...]]


Kind = TypeVar("Kind", bound=_Named)


def form_of(state: Mapping[str, Any], forms: Sequence[type[Kind]]) -> type[Kind]:
    """Return the form that has the names in a checkpoint's entry.

    Raises:
        ValueError: If no form has.
    """
    for form in forms:
        if set(form.names) == set(state):
            return form
    known = "; ".join(", ".join(form.names) for form in forms)
    raise ValueError(f"Preconditioner state has an entry of {', '.join(state) or 'nothing'}, expected one of: {known}.")


def factor_from_state(state: Mapping[str, Tensor], geometry: LayerGeometry) -> Factor:
    """Return the factor in a checkpoint's entry, for a layer of this geometry.

    Raises:
        ValueError: If no form has such an entry.
    """
    form = form_of(state, (*MOMENT_FORMS, *LOW_RANK_FORMS))
    (values,) = state.values()
    return form.of(values, geometry)


def inverse_from_state(state: Mapping[str, Tensor], geometry: LayerGeometry) -> Inverse:
    """Return the inverse in a checkpoint's entry, for a layer of this geometry.

    Raises:
        ValueError: If no form has such an entry.
    """
    return form_of(state, INVERSE_FORMS).from_tensors(state, geometry)


__all__ = [
    "INVERSE_FORMS",
    "LOW_RANK_FORMS",
    "MOMENT_FORMS",
    "NUM_DESCRIBED",
    "BlockMessage",
    "ComputedInverse",
    "DenseFactor",
    "DenseInverse",
    "EigenBasis",
    "Factor",
    "Inverse",
    "LowRankFactor",
    "LowRankInverse",
    "MomentFactor",
    "NamedTensors",
    "PatchFactor",
    "PatchInverse",
    "RefreshResult",
    "RowsFactor",
    "SplitInverse",
    "SplitLowRankInverse",
    "described_rows",
    "description_of",
    "factor_from_state",
    "form_of",
    "inverse_from_state",
    "moment_form",
]
