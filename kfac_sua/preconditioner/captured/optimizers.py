"""The optimizers of a captured step: the values that a graph keeps, and the learning rates that it reads anew."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

from kfac_sua.preconditioner.captured.values import identity, plain_attributes, tensors

Group = dict[str, Any]


@dataclass
class _Rate:
    """A group's learning rate as a 0-d tensor, and the number that it holds."""

    group: Group
    tensor: Tensor
    number: float = 0.0

    @property
    def is_number(self) -> bool:
        """Whether the group holds a number. A tensor is the caller's, and the step reads that one."""
        return not isinstance(self.group["lr"], Tensor)


class StepOptimizers:
    """All optimizers that a step may use.

    For ``SGD``, ``Adam`` and ``AdamW`` that are fused or made with ``capturable=True``, the learning rate is a tensor
    on the device while the step runs, so that a graph reads its value at each replay. All other numbers become part of
    the graph.

    Args:
        optimizers: Those that the caller knows; optimizers that these wrap are found.
        device: The device of the learning rates.
    """

    def __init__(self, optimizers: Sequence[Optimizer], device: torch.device) -> None:
        self.all = list(_with_inner(optimizers))
        self._device = device
        self._rates: list[_Rate] = []
        self._follow_groups()

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters of all groups."""
        return [parameter for group in self._groups for parameter in group["params"]]

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors in groups and state, parameters among them, and the learning rates on the device."""
        states = [state for one in self.all for state in one.state.values()]
        return [*tensors([self._groups, states]), *(rate.tensor for rate in self._rates)]

    def refresh_rates(self) -> None:
        """Copy changed learning rates to the device, without waiting for it."""
        self._follow_groups()
        for rate in self._rates:
            if rate.is_number and rate.group["lr"] != rate.number:
                rate.number = rate.group["lr"]
                rate.tensor.fill_(rate.number)

    @contextmanager
    def rates_on_device(self) -> Iterator[None]:
        """Make the groups hold their learning rates as tensors on the device while a step runs inside.

        Raises:
            RuntimeError: If the step has changed a learning rate.
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
        """Mark fused optimizers as capturable, which they are, as they count their steps on the device."""
        changed = [group for group in self._groups if group.get("fused") and group.get("capturable") is False]
        for group in changed:
            group["capturable"] = True
        try:
            yield
        finally:
            for group in changed:
                group["capturable"] = False

    def numbers(self) -> list[tuple[str, Any]]:
        """Return the numbers and addresses of the optimizers that are part of a graph, each with its description."""
        from_device = {id(rate.group) for rate in self._rates if rate.is_number}
        values: list[tuple[str, Any]] = [("learning rates", [rate.tensor.data_ptr() for rate in self._rates])]
        for one in self.all:
            hooks = [*one._optimizer_step_pre_hooks, *one._optimizer_step_post_hooks]
            values += [(f"{type(one).__name__}'s hooks", hooks)]
            values += [(f"{key} of {type(one).__name__}", value) for key, value in _attributes(one).items()]
        for index, group in enumerate(self._groups):
            values.append((f"the parameters of group {index}", [one.data_ptr() for one in group["params"]]))
            for key, value in group.items():
                if key != "params" and not (key == "lr" and id(group) in from_device):
                    values.append((f"{key} of group {index}", identity(value)))
        return values

    def state(self) -> list[list[Any]]:
        """Return the numbers and addresses in the state of every parameter."""
        return [
            [identity(value) for value in state.values()]
            for optimizer in self.all
            for state in optimizer.state.values()
        ]

    def save(self) -> Callable[[], None]:
        """Save the numbers and tensors in groups and state; return the function that restores them."""
        groups = [(group, {key: value for key, value in group.items() if key != "params"}) for group in self._groups]
        attributes = [(one, _attributes(one)) for one in self.all]
        states = [(one, {key: dict(value) for key, value in one.state.items()}) for one in self.all]

        def restore() -> None:
            for group, values in groups:
                group.update(values)
            for one, values in attributes:
                vars(one).update(values)
            for one, state in states:
                one.state.clear()
                one.state.update({key: dict(value) for key, value in state.items()})

        return restore

    @property
    def _groups(self) -> list[Group]:
        return [group for one in self.all for group in one.param_groups]

    def _follow_groups(self) -> None:
        """Make a learning rate on the device for each group; loading a state replaces all groups."""
        groups = [
            group
            for one in self.all
            if isinstance(one, SGD | Adam)
            for group in one.param_groups
            if group.get("fused") or group.get("capturable")  # these kernels read the rate from the device
        ]
        if [id(group) for group in groups] != [id(rate.group) for rate in self._rates]:
            # In float32, which the fused kernels read.
            self._rates = [_Rate(group, torch.zeros((), device=self._device)) for group in groups]


def _with_inner(optimizers: Sequence[Optimizer]) -> Iterator[Optimizer]:
    for optimizer in optimizers:
        yield optimizer
        yield from _with_inner([value for value in vars(optimizer).values() if isinstance(value, Optimizer)])


def _attributes(optimizer: Optimizer) -> dict[str, Any]:
    """Return an optimizer's own plain attributes; those of PyTorch's base class begin with ``_``."""
    return {key: value for key, value in plain_attributes(optimizer).items() if key[0] != "_"}
