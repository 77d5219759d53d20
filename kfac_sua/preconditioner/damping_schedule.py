"""Damping that changes during training: as a function of the step, or by a scheduler that the training loop steps.

A new damping takes effect at the next refresh of the inverses, under every damping rule; until then the inverses of the
last refresh are applied.
"""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from kfac_sua.preconditioner.checkpoint.checks import RESTART, checked_entries, is_count, is_damping, outlined
from kfac_sua.preconditioner.plain_numbers import checked_number
from kfac_sua.preconditioner.settings import checked_damping

DampingFunction = Callable[[int], float]
"""Returns the damping ε > 0 for the number of steps taken."""


class Damped(Protocol):
    """An object with a damping that can be set, such as a preconditioner."""

    damping: float


def exponential_damping(initial: float, final: float, num_steps: float) -> DampingFunction:
    """Return initial · (final / initial)^(k / num_steps) as a function of k, and ``final`` from ``num_steps`` on.

    Reference: this project's; Martens & Grosse (2015) adapt the damping instead (see ``adaptive_damping``).

    Args:
        initial: ε at step 0, > 0.
        final: ε at step ``num_steps``, > 0, larger or smaller.
        num_steps: Number of steps from one to the other, ≥ 1.

    Raises:
        ValueError: If a damping is not a number > 0, or ``num_steps`` is not a number ≥ 1.
    """
    initial, final = checked_damping(initial), checked_damping(final)
    num_steps = checked_number("num_steps", num_steps)
    if not num_steps >= 1:
        raise ValueError(f"num_steps must be >= 1, got {num_steps}.")

    def damping(step: int) -> float:
        return final if step >= num_steps else initial * (final / initial) ** (step / num_steps)

    return damping


class DampingScheduler:
    """Multiplies a preconditioner's first damping by a function of the number of calls of :meth:`step`.

    It works as ``torch.optim.lr_scheduler.LambdaLR`` does for learning rates::

        scheduler = DampingScheduler(preconditioner, lambda epoch: 0.5**epoch)
        for epoch in range(epochs):
            ...  # the epoch's steps
            scheduler.step()

    The function is not saved: to continue, make the scheduler with the same function, then load its state and the
    preconditioner's.

    Args:
        preconditioner: Made with a number as ``damping``.
        factor: Returns, for the number of calls, what the first damping is multiplied by.

    Raises:
        ValueError: If the factor is not a number, the product is not > 0, or the preconditioner's damping is itself a
            function of the step.
    """

    def __init__(self, preconditioner: Damped, factor: Callable[[int], float]) -> None:
        self._preconditioner = preconditioner
        self._factor = factor
        self._base = preconditioner.damping
        self.num_calls = 0
        self._set()

    def step(self) -> None:
        """Count a call, and set the damping for the new count."""
        self.num_calls += 1
        self._set()

    def state_dict(self) -> dict[str, Any]:
        """Return the number of calls and the first damping."""
        return {"num_calls": self.num_calls, "base": self._base}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`; the current damping is part of the preconditioner's state.

        Raises:
            ValueError: If it is not such a state; the scheduler is then as it was.
        """
        num_calls, base = checked_entries(state, ("num_calls", "base"), "DampingScheduler")
        if not is_count(num_calls):
            raise ValueError(
                f"DampingScheduler state: num_calls must be a whole number >= 0, got {outlined(num_calls)}; {RESTART}."
            )
        if not is_damping(base):
            raise ValueError(
                f"DampingScheduler state: base must be a damping > 0 within the range of float32, got "
                f"{outlined(base)}; {RESTART}."
            )
        self.num_calls, self._base = num_calls, base

    def _set(self) -> None:
        factor = checked_number("the damping scheduler's factor", self._factor(self.num_calls))
        self._preconditioner.damping = self._base * factor
