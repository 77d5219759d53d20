"""Nested values: what is found in them, and which changes are seen."""

from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from kfac_sua.preconditioner.captured.values import identity, plain_attributes, plain_values, tensors

Pair = namedtuple("Pair", ["first", "second"])


@dataclass
class Result:
    """What a function may return."""

    first: Any
    second: Any


@dataclass(slots=True)
class Slots:
    """The same, without a dict of attributes."""

    first: Any
    second: Any


NESTED = {
    "list": lambda *values: [*values],
    "tuple": lambda *values: values,
    "named tuple": Pair,
    "dict": lambda *values: dict(enumerate(values)),
    "ordered dict": lambda *values: OrderedDict(enumerate(values)),
    "dataclass": Result,
    "slots": Slots,
    "nested": lambda first, second: {"outer": [Result((first,), None), {"inner": Slots(torch.float32, second)}]},
}


@pytest.mark.parametrize("name", NESTED)
def test_what_is_nested_is_found(name):
    """Tensors and plain values alike, and nothing else."""
    one, other = torch.zeros(2), torch.ones(3)
    found = list(tensors(NESTED[name](one, other)))
    assert len(found) == 2
    assert found[0] is one
    assert found[1] is other
    assert list(plain_values(NESTED[name](0.5, "text"))) == [0.5, "text"]
    assert list(plain_values(NESTED[name](None, True))) == [True]
    assert not list(tensors(NESTED[name](0.5, torch.device("cpu"))))


@pytest.mark.parametrize("name", NESTED)
def test_what_is_replaced_is_seen(name):
    """A tensor elsewhere or another number is another value; the same tensor with other numbers is not."""
    tensor = torch.zeros(2)
    before = identity(NESTED[name](tensor, 1))
    tensor.fill_(5.0)
    assert identity(NESTED[name](tensor, 1)) == before
    assert identity(NESTED[name](tensor.clone(), 1)) != before
    assert identity(NESTED[name](tensor, 2)) != before
    assert identity(NESTED[name](tensor, None)) != before


def test_a_leaf_is_a_value_too():
    """A function may return one tensor, or nothing."""
    tensor = torch.zeros(2)
    assert list(tensors(tensor)) == [tensor]
    assert list(plain_values(3)) == [3]
    assert not [*tensors(None), *plain_values(None), *tensors(Result)]


def test_plain_attributes_of_a_module():
    """Its mode and its numbers, neither parameters nor hooks."""
    attributes = plain_attributes(nn.Dropout(0.25).eval())
    assert attributes == {"training": False, "p": 0.25, "inplace": False}
