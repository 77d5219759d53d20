"""Nested values, such as the results of functions and the states of optimizers: their leaves and their identity.

Values nest in lists, tuples, mappings and dataclasses; anything else is a leaf.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor

PLAIN = (int, float, str)
"""Types of plain values, which a graph keeps as they were. ``bool`` is an ``int``; each further type takes time."""

_USUAL_LEAVES = (Tensor, *PLAIN, type(None))


def tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in a value."""
    return (leaf for leaf in _leaves(value) if isinstance(leaf, Tensor))


def plain_values(value: Any) -> Iterator[Any]:
    """Yield the plain values in a value."""
    return (leaf for leaf in _leaves(value) if isinstance(leaf, PLAIN))


def plain_attributes(owner: object) -> dict[str, Any]:
    """Return an object's attributes that are plain: a module's mode, probabilities, counters and the like."""
    return {key: value for key, value in vars(owner).items() if isinstance(value, PLAIN)}


def identity(value: Any) -> Any:
    """Return what changes if a value that a graph holds is replaced: the address of a tensor, or the value itself."""
    if isinstance(value, Tensor):
        return value.data_ptr(), value.dtype
    items = _items(value)
    return value if items is None else [(key, identity(one)) for key, one in items]


def is_at(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors lie at the same address."""
    return one.data_ptr() == other.data_ptr()


def _leaves(value: Any) -> Iterator[Any]:
    items = _items(value)
    if items is None:
        yield value
        return
    for _, one in items:
        yield from _leaves(one)


def _items(value: Any) -> Iterable[tuple[Any, Any]] | None:
    """Return the items that a value nests, with their keys; ``None`` for a leaf.

    The most frequent types are tested first, as every value of an optimizer's state is tested before each replay.
    """
    if isinstance(value, _USUAL_LEAVES):
        return None
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [(field.name, getattr(value, field.name, None)) for field in dataclasses.fields(value)]
    if isinstance(value, Mapping):
        return value.items()
    return enumerate(value) if isinstance(value, list | tuple) else None
