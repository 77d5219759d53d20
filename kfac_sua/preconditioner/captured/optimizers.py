"""The optimizers of a captured step: what of them a graph holds, and a learning rate that it reads from the device."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, Optimizer

Group = dict[str, Any]


@dataclass
class _Rate:
    """A group's learning rate as a 0-d tensor, and the number that it holds."""

    group: Group
    tensor: Tensor
    number: float = 0.0

    @property
    def is_number(self) -> bool:
        """Whether the group holds a number: a tensor is the caller's, and the step reads that."""
        return not isinstance(self.group["lr"], Tensor)


class StepOptimizers:
    """All optimizers that a step may use.

    In the fused optimizers, and in those made with ``capturable=True``, of the classes ``SGD``, ``Adam`` and ``AdamW``,
    the learning rate is a tensor on the device while the step runs: a graph reads its value at each replay. All other
    numbers are part of the graph.

    Args:
        optimizers: Those that the caller knows; what they are made of, where one wraps others, is found.
        device: Where the learning rates go.
    """

    def __init__(self, optimizers: Sequence[Optimizer], device: torch.device) -> None:
        self._optimizers = list(_with_inner(optimizers))
        self._rates = [
            _Rate(group, torch.zeros((), device=device))  # float32, which the fused kernels read
            for optimizer in self._optimizers
            for group in optimizer.param_groups
            if _reads_rate_from_device(optimizer, group)
        ]

    def refresh_rates(self) -> None:
        """Bring the learning rates to the device, without waiting for it."""
        for rate in self._rates:
            if rate.is_number and rate.group["lr"] != rate.number:
                rate.number = rate.group["lr"]
                rate.tensor.fill_(rate.number)

    @contextmanager
    def rates_on_device(self) -> Iterator[None]:
        """Let the groups hold their learning rates as tensors on the device while a step runs inside.

        Raises:
            RuntimeError: If the step has changed one.
        """
        self.refresh_rates()
        rates = [rate for rate in self._rates if rate.is_number]
        for rate in rates:
            rate.group["lr"] = rate.tensor
        versions = [rate.tensor._version for rate in rates]
        try:
            yield
            for rate, version in zip(rates, versions, strict=True):
                if rate.group["lr"] is not rate.tensor or rate.tensor._version != version:
                    raise RuntimeError(
                        "The function of a captured step changes the learning rate, which no replay would do; call the "
                        "scheduler after it."
                    )
        finally:
            for rate in rates:
                rate.group["lr"] = rate.number

    @contextmanager
    def capturable(self) -> Iterator[None]:
        """Let fused optimizers say that they can be captured: they keep their counts of steps on the device anyway."""
        groups = [group for one in self._optimizers for group in one.param_groups]
        changed = [group for group in groups if group.get("fused") and group.get("capturable") is False]
        for group in changed:
            group["capturable"] = True
        try:
            yield
        finally:
            for group in changed:
                group["capturable"] = False

    def numbers(self) -> list[tuple[Any, ...]]:
        """Return the numbers and addresses in the groups that are part of a graph, a tuple per group."""
        from_device = {id(rate.group) for rate in self._rates if rate.is_number}
        return [
            (
                type(optimizer).__name__,
                len(group["params"]),
                len(optimizer._optimizer_step_pre_hooks),
                len(optimizer._optimizer_step_post_hooks),
                *(
                    (key, _identity(value))
                    for key, value in group.items()
                    if key != "params" and not (key == "lr" and id(group) in from_device)
                ),
            )
            for optimizer in self._optimizers
            for group in optimizer.param_groups
        ]

    def state(self) -> list[list[Any]]:
        """Return the numbers and addresses in the state of every parameter."""
        return [
            [value.data_ptr() if isinstance(value, Tensor) else value for value in state.values()]
            for optimizer in self._optimizers
            for state in optimizer.state.values()
        ]

    def save_state(self) -> list[dict[Tensor, dict[str, Any]]]:
        """Return which tensors the state holds, not their values."""
        return [{key: dict(value) for key, value in one.state.items()} for one in self._optimizers]

    def restore_state(self, saved: list[dict[Tensor, dict[str, Any]]]) -> None:
        """Let the state hold those tensors again."""
        for optimizer, state in zip(self._optimizers, saved, strict=True):
            optimizer.state.clear()
            optimizer.state.update({key: dict(value) for key, value in state.items()})


def _with_inner(optimizers: Sequence[Optimizer]) -> Iterator[Optimizer]:
    for optimizer in optimizers:
        yield optimizer
        yield from _with_inner([value for value in vars(optimizer).values() if isinstance(value, Optimizer)])


def _reads_rate_from_device(optimizer: Optimizer, group: Group) -> bool:
    return isinstance(optimizer, SGD | Adam) and bool(group.get("fused") or group.get("capturable"))


def _identity(value: Any) -> Any:
    """Return what tells whether a graph that holds a value still holds the right one: an address, or the value."""
    return (value.data_ptr(), value.dtype) if isinstance(value, Tensor) else value
