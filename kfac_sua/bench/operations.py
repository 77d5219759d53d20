"""Operations of a step, counted as they run. On a GPU each one is a launch, and launches are most of its cost.

An operation is a call of PyTorch's dispatcher that works on numbers. Views and empty tensors only take the host's time,
and are counted apart. Fused kernels of several tensors count once, as does a factorisation, whatever its library does.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kfac_sua.bench.contender import Contender
from kfac_sua.training.timing import Stopwatch

NOTHING_TO_DO = {
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "detach"),
    *("_reshape_alias", "is_same_size", "resize_", "_local_scalar_dense"),
}
"""Operations that launch nothing; nor do those whose result is a view of an argument."""

WAITS = {"_local_scalar_dense", "item", "is_nonzero", "nonzero", "nonzero_numpy", "equal", "masked_select"}
"""Operations for which the host waits for a GPU. ``tolist()``, ``numpy()`` and ``cpu()`` run none on a CPU."""


@dataclasses.dataclass(frozen=True)
class Operations:
    """Counts of one step.

    Args:
        launches: Operations on numbers.
        views: Operations that only make another tensor of the same memory, or an empty one.
        waits: Reads of a number, for which the host waits.
    """

    launches: int
    views: int
    waits: int


class OperationCounter(TorchDispatchMode):
    """Counts the operations inside, and carries them out."""

    def __init__(self) -> None:
        super().__init__()
        self.launches = self.views = self.waits = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count an operation."""
        name = func._schema.name.removeprefix("aten::")
        returns = func._schema.returns
        alias = returns[0].alias_info if returns else None
        is_view = alias is not None and not alias.is_write
        self.waits += waits_for_device(name, args)
        if is_view or name in NOTHING_TO_DO:
            self.views += 1
        else:
            self.launches += 1
        return func(*args, **(kwargs or {}))

    @property
    def counted(self) -> Operations:
        """What has been counted so far."""
        return Operations(self.launches, self.views, self.waits)


def waits_for_device(name: str, args: Sequence[Any]) -> bool:
    """Return whether the host would wait for a GPU in an operation, to read a number or to learn a size.

    Args:
        name: Its name, without ``aten::``.
        args: Its arguments.
    """
    if name == "index":  # by a mask, which selects as many entries as it has ones
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    return name in WAITS


def count_operations(contender: Contender) -> dict[str, Operations]:
    """Return the operations of each kind of step, taken eagerly, of a contender that has had its first refresh."""
    counts = {}
    for kind in contender.steps_per_period:
        contender.make_due(kind)
        with OperationCounter() as counter:
            contender.step(Stopwatch("cpu"))
        counts[kind.value] = counter.counted
    return counts
