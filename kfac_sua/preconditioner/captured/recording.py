"""One captured step: the tensors that it reads and fills, and the gradients before and after it."""

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
        """Return whether the gradient at hand is one that a replay can start from.

        If the captured step works in place on the gradient before it, the gradient at hand must be that tensor. If it
        drops the gradient unread, any will do. If there was none, there must be none, as a replay would not add to it.
        """
        grad = self.parameter.grad
        if self._was_missing:
            return grad is None
        if self._kept is not None:
            return grad is not None and is_at(grad, self._kept)
        return not self._is_read

    def put(self) -> None:
        """Set the parameter's gradient to the tensor that a replay has filled."""
        if self.parameter.grad is not self.after:
            self.parameter.grad = self.after


@dataclass
class Recording(Generic[T]):
    """A captured step.

    Args:
        inputs: The tensors from which it reads a mini-batch.
        result: The result of the function, whose tensors replays fill.
        grads: Every parameter's gradient.
        reading: The values that it depends on.
        found: The inspection that knows which tensors the step found rather than made.
        events: Events that a step counts, such as layers that are frozen.
        num_replays: Number of replays.
    """

    inputs: tuple[Tensor, ...]
    result: T
    grads: list[Grad]
    reading: Reading
    found: StepInspection
    events: Counter[str]
    num_replays: int = 0
