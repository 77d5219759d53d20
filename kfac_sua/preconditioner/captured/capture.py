"""One captured step: what it reads and fills, and the host's state around it."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from torch import Tensor, nn

from kfac_sua.preconditioner.captured.dependencies import Reading
from kfac_sua.preconditioner.captured.inspection import StepInspection
from kfac_sua.preconditioner.captured.optimizers import StepOptimizers
from kfac_sua.preconditioner.kfac import KroneckerPreconditioner

T = TypeVar("T")


class Grad:
    """A parameter, and its gradient before and after a captured step.

    Args:
        parameter: The parameter.
        before: Its gradient before.
        after: Its gradient after.
    """

    def __init__(self, parameter: nn.Parameter, before: Tensor | None, after: Tensor | None) -> None:
        self.parameter = parameter
        self.after = after
        self._was_missing = before is None
        is_in_place = before is not None and after is not None and before.data_ptr() == after.data_ptr()
        self._kept = before if is_in_place else None

    def fits(self) -> bool:
        """Whether the gradient at hand is what a replay would find.

        If the step works on the gradient that was there, in place, it must be that one. Otherwise the step makes one,
        and it matters only whether there was one: to be dropped, or to be added to.
        """
        grad = self.parameter.grad
        if grad is None or self._was_missing:
            return grad is None and self._was_missing
        return self._kept is None or grad.data_ptr() == self._kept.data_ptr()

    def put(self) -> None:
        """Let the parameter's gradient be what a replay has filled."""
        if self.parameter.grad is not self.after:
            self.parameter.grad = self.after


@dataclass
class Capture(Generic[T]):
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
    events: Counter[str] = field(default_factory=Counter)
    num_replays: int = 0


class HostState:
    """What the Python of a step changes on the host, as it is now; a capture that fails must leave no trace of it.

    Args:
        parameters: The model's parameters.
        optimizers: What updates them.
        preconditioner: What preconditions their gradients.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        optimizers: StepOptimizers,
        preconditioner: KroneckerPreconditioner | None,
    ) -> None:
        self._parameters = parameters
        self._optimizers = optimizers
        self._preconditioner = preconditioner
        self.grads = [parameter.grad for parameter in parameters]
        self._state: list[dict[Any, dict[str, Any]]] = optimizers.save_state()
        self._num_steps = steps_of(preconditioner)
        self._events = Counter() if preconditioner is None else preconditioner.events.copy()

    @property
    def num_steps_since(self) -> int:
        """Steps that the preconditioner has counted since."""
        return steps_of(self._preconditioner) - self._num_steps

    @property
    def events_since(self) -> Counter[str]:
        """Events that the preconditioner has counted since."""
        return Counter() if self._preconditioner is None else self._preconditioner.events - self._events

    def restore(self) -> None:
        """Put it back."""
        for parameter, grad in zip(self._parameters, self.grads, strict=True):
            parameter.grad = grad
        self._optimizers.restore_state(self._state)
        if self._preconditioner is not None:
            self._preconditioner.discard()
            self._preconditioner.go_to_step(self._num_steps)
            events = self._preconditioner.events
            events.clear()
            events.update(self._events)


def steps_of(preconditioner: KroneckerPreconditioner | None) -> int:
    """Return the preconditioner's count of steps; 0 without one."""
    return 0 if preconditioner is None else preconditioner.num_steps
