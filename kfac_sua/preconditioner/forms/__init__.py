"""The forms that a factor can be kept in, and what a refresh makes of each: one form, one file, one protocol.

| form | factor | what a refresh makes of it |
|---|---|---|
| dense | ``DenseFactor``, moments | ``DenseInverse`` |
| rows | ``RowsFactor``, few of them | ``LowRankInverse`` (Woodbury) |
| patches | ``PatchFactor``, rows that are never formed | ``PatchInverse`` (Woodbury) |
| eigenbasis | any of these, made dense | ``EigenBasis`` (exact damping) |

A new form is a file here and an entry in one of the two lists. Under the forms lie what they are made of: reading
pixels (``unfold``, ``patch_rows``), rows and moments of them (``moments``, ``correlations``), triangles, counted costs.
"""

from collections.abc import Mapping, Sequence
from itertools import chain

from torch import Tensor

from kfac_sua.preconditioner.forms.dense import DenseFactor, DenseInverse
from kfac_sua.preconditioner.forms.eigen import EigenBasis
from kfac_sua.preconditioner.forms.form import BlockMessage, Factor, Inverse, Prepared, RowFactor, SumFactor
from kfac_sua.preconditioner.forms.patches import PatchFactor, PatchInverse
from kfac_sua.preconditioner.forms.rows import LowRankInverse, RowsFactor
from kfac_sua.preconditioner.geometry import LayerGeometry

SUM_FORMS: tuple[type[SumFactor], ...] = (DenseFactor,)
"""Forms of moments that add up, in the order in which they are asked whether they are chosen."""

ROW_FORMS: tuple[type[RowFactor], ...] = (PatchFactor, RowsFactor)
"""Forms of rows, in the order in which they are asked whether they can hold what was measured."""

NUM_DESCRIBED = 5
"""Integers of :func:`description_of`: a number and four sizes, which pixels need."""


def sum_form(width: int) -> type[SumFactor]:
    """Return the form that moments of blocks of this width are added up in."""
    return next(form for form in SUM_FORMS if form.is_chosen(width))


def description_of(factor: Factor) -> list[int]:
    """Return what other processes need to know of a factor's form, as :data:`NUM_DESCRIBED` integers.

    The number of its form among those of rows, from 1, and the sizes of what these are kept as; zeros for moments,
    whose form and sizes all processes know.
    """
    if factor.is_summed:
        return [0] * NUM_DESCRIBED
    number = next(number for number, form in enumerate(ROW_FORMS, start=1) if type(factor) is form)
    sizes = list(factor.values.shape)
    return [number, *sizes, *[0] * (NUM_DESCRIBED - 1 - len(sizes))]


def described_rows(description: Sequence[int]) -> tuple[type[RowFactor], tuple[int, ...]] | None:
    """Return the form and the sizes that :func:`description_of` told; ``None`` for moments."""
    number, *sizes = description
    if number == 0:
        return None
    form = ROW_FORMS[number - 1]
    return form, tuple(sizes[: form.num_sizes])


def factor_from_state(state: Mapping[str, Tensor], geometry: LayerGeometry) -> Factor:
    """Return the factor of a checkpoint's entry ``{name: values}``, of a layer of this geometry."""
    ((name, values),) = state.items()
    form = next(form for form in chain(SUM_FORMS, ROW_FORMS) if form.name == name)
    return form.of(values, geometry)


def inverse_from_state(state: Mapping[str, Tensor], geometry: LayerGeometry) -> Inverse:
    """Return the inverse of a checkpoint's entry, of a layer of this geometry."""
    forms = (form.inverse_form for form in chain(SUM_FORMS, ROW_FORMS))
    return next(form for form in forms if set(form.names) == set(state)).from_tensors(state, geometry)


__all__ = [
    "NUM_DESCRIBED",
    "ROW_FORMS",
    "SUM_FORMS",
    "BlockMessage",
    "DenseFactor",
    "DenseInverse",
    "EigenBasis",
    "Factor",
    "Inverse",
    "LowRankInverse",
    "PatchFactor",
    "PatchInverse",
    "Prepared",
    "RowFactor",
    "RowsFactor",
    "SumFactor",
    "described_rows",
    "description_of",
    "factor_from_state",
    "inverse_from_state",
    "sum_form",
]
