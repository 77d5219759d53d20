"""Trainings that are saved, loaded into new objects and continued."""

import io
from collections.abc import Callable
from typing import Protocol, TypeVar

import torch
from torch import nn


class Resumable(Protocol):
    """A training run with everything in it that has a state."""

    net: nn.Module

    @property
    def parts(self) -> list:
        """What has a state."""

    def train(self, steps: range) -> None:
        """Take steps."""


AnyRun = TypeVar("AnyRun", bound=Resumable)


def continued_bit_for_bit(make: Callable[[], AnyRun], *, pause: int, num_steps: int) -> tuple[AnyRun, AnyRun, AnyRun]:
    """Check that a run saved after ``pause`` steps and continued in new objects ends where one without pause does.

    The states go through a file that must load with ``weights_only=True``.

    Returns:
        The run without pause, the one that was saved, and the one that continued it.
    """
    whole, first, second = make(), make(), make()
    whole.train(range(num_steps))
    first.train(range(pause))
    buffer = io.BytesIO()
    torch.save([part.state_dict() for part in first.parts], buffer)
    buffer.seek(0)
    for part, state in zip(second.parts, torch.load(buffer, weights_only=True), strict=True):
        part.load_state_dict(state)
    second.train(range(pause, num_steps))
    for got, want in zip(second.net.parameters(), whole.net.parameters(), strict=True):
        assert torch.equal(got, want)
    return whole, first, second
