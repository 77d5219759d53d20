"""One captured step: what it reads and fills, and the gradients around it."""

from collections import Counter
from dataclasses import dataclass
from typing import Generic, TypeVar

from torch import Tensor, nn

from kfac_sua.preconditioner.captured.dependencies import Reading
from kfac_sua.preconditioner.captured.inspection import StepInspection
from kfac_sua.preconditioner.captured.values import is_at

T = TypeVar("T")


class Grad:
    """A parameter, and its gradient before and after a captured step.

    Args:
        parameter: The parameter.
        before: Its gradient before.
        after: Its gradient after.
        is_read: Whether the step reads or writes the gradient before.
    """

    def __init__(self, parameter: nn.Parameter, before: Tensor | None, after: Tensor | None, *, is_read: bool) -> None:
        self.parameter = parameter
        self.after = after
        self._was_missing = before is None
        self._is_read = is_read
        self._kept = before if before is not None and after is not None and is_at(before, after) else None

    def fits(self) -> bool:
        """Whether the gradient at hand is what a replay would find.

        If the step works on the gradient that was there, in place, it must be that one. If it drops what is there
        unread, anything will do. If there was none, there must be none, as it would be added to.
        """
        grad = self.parameter.grad
        if self._was_missing:
            return grad is None
        if self._kept is not None:
            return grad is not None and is_at(grad, self._kept)
        return not self._is_read

    def put(self) -> None:
        """Let the parameter's gradient be what a replay has filled."""
        if self.parameter.grad is not self.after:
            self.parameter.grad = self.after


@dataclass
class Recording(Generic[T]):
    """A captured step.

    Args:
        inputs: The tensors that it reads a mini-batch from.
        result: What the function returned: tensors that replays fill.
        grads: Every parameter's gradient.
        reading: What it depends on.
        found: Knows the tensors that it found rather than made.
        events: What a step reports of the preconditioner's layers, such as frozen ones.
        num_replays: How often it was replayed.
    """

    inputs: tuple[Tensor, ...]
    result: T
    grads: list[Grad]
    reading: Reading
    found: StepInspection
    events: Counter[str]
    num_replays: int = 0
