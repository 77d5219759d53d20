"""Parameters of which the fast tests take a few, and the slow ones the rest."""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import pytest


def one_in(number: int, values: Iterable[Any]) -> list[Any]:
    """Return values as parameters of one test, of which the first and every ``number``-th after it are fast.

    Args:
        number: How many values lie from one fast one to the next.
        values: A value each, or a tuple for several names.
    """
    return [_param(value, is_fast=index % number == 0) for index, value in enumerate(values)]


def diagonal(*axes: Iterable[Any]) -> list[Any]:
    """Return a product as parameters of one test, of which as many are fast as the longest axis has values.

    Every value of every axis is in a fast one. A shorter axis is shifted each time that it is gone through, by another
    number than others of its length, so that it goes in step with none of them nor with the longest.

    Args:
        axes: The values for each name.
    """
    values = [list(axis) for axis in axes]
    sizes = [len(one) for one in values]
    longest = sizes.index(max(sizes))
    shifts = [(1, 0, 2, 3)[sizes[:axis].count(size)] for axis, size in enumerate(sizes)]

    def is_fast(indices: Sequence[int]) -> bool:
        along = indices[longest]
        return all(
            axis == longest or index == (along + shifts[axis] * (along // sizes[axis])) % sizes[axis]
            for axis, index in enumerate(indices)
        )

    return [
        _param(tuple(axis[index] for axis, index in zip(values, indices, strict=True)), is_fast=is_fast(indices))
        for indices in itertools.product(*(range(len(axis)) for axis in values))
    ]


def _param(value: Any, *, is_fast: bool) -> Any:
    values = value if isinstance(value, tuple) else (value,)
    return pytest.param(*values, marks=() if is_fast else pytest.mark.slow)
