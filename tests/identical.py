"""Bit-for-bit comparison of nested state, such as checkpoints hold."""

from typing import Any

import torch


def assert_identical(actual: Any, expected: Any, where: str = "state") -> None:
    """Compare dictionaries, lists, tensors and plain values; a difference is reported with its path."""
    if isinstance(expected, dict):
        assert actual.keys() == expected.keys(), where
        for key, value in expected.items():
            assert_identical(actual[key], value, f"{where}[{key!r}]")
    elif isinstance(expected, list | tuple):
        assert len(actual) == len(expected), where
        for index, value in enumerate(expected):
            assert_identical(actual[index], value, f"{where}[{index}]")
    elif isinstance(expected, torch.Tensor):
        assert actual.dtype == expected.dtype, where
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, msg=lambda text: f"{where}: {text}")
    else:  # a number that is none is identical to another such
        assert actual == expected or (actual != actual and expected != expected), where
