"""Finds what a step does that cannot be captured, by watching each operation that PyTorch dispatches."""

import random
import sys
import sysconfig
import traceback
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from kfac_sua.preconditioner.captured.values import tensors

COMMUNICATION = {"c10d", "_c10d_functional", "c10d_functional"}
"""Namespaces of the operations between processes."""

_aten = torch.ops.aten
INDEXING = {_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default, _aten._index_put_impl_.default}
"""Operations whose sizes depend on values only if an index is a mask of bool."""

LIBRARIES = (str(Path(torch.__file__).parent), str(Path(__file__).parents[2]), sysconfig.get_paths()["stdlib"])
"""Paths of code that is not the user's, in which no line is named in a warning."""


class StepInspection(TorchDispatchMode):
    """Watches the step that runs inside.

    Args:
        device: The device on which the step's tensors must be.

    Attributes:
        refusals: What the step did that cannot be captured, a clause each.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.refusals: list[str] = []
        self._device = device
        self._made: dict[int, StorageWeakRef] = {}
        self._found: dict[int, tuple[StorageWeakRef, str]] = {}
        self._optimizers: set[Optimizer] = set()

    def __enter__(self) -> "StepInspection":
        """Begin to watch."""
        self._host_randomness = _host_randomness()
        self._handle = register_optimizer_step_pre_hook(lambda optimizer, args, kwargs: self._optimizers.add(optimizer))
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        """Stop watching."""
        super().__exit__(*exception)
        self._handle.remove()
        if self._host_randomness != _host_randomness():
            self.refusals.append("it draws random numbers of Python's or NumPy's, which a replay would not")

    def freed(self) -> list[str]:
        """Describe the tensors that the step found, rather than made, and that have been freed since."""
        return [description for reference, description in self._found.values() if reference.expired()]

    def has_found(self, tensor: Tensor) -> bool:
        """Return whether the step has read or written a tensor that existed before it."""
        return _storage_key(tensor) in self._found

    def carried_from(self, step_before: "StepInspection", kept: Iterable[Tensor]) -> list[str]:
        """Describe the tensors made by the step before and found by this one, apart from those written in place."""
        expected = set(map(_storage_key, kept))
        alive = {key for key, reference in step_before._made.items() if not reference.expired()}
        return [text for key, (_, text) in self._found.items() if key in alive - expected]

    def strangers(self, optimizers: Iterable[Optimizer]) -> list[Optimizer]:
        """Return the optimizers that have taken a step and are not among the given ones."""
        return [one for one in self._optimizers if all(one is not other for other in optimizers)]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Inspect one operation, and carry it out."""
        del types
        kwargs = kwargs or {}
        inputs = list(tensors((*args, *kwargs.values())))
        for tensor in inputs:
            if (key := _storage_key(tensor)) not in self._made and key not in self._found:
                description = f"{tensor.dtype} {list(tensor.shape)}"
                self._found[key] = StorageWeakRef(tensor.untyped_storage()), description
        result = func(*args, **kwargs)
        outputs = list(tensors(result))
        for tensor in outputs:
            if (key := _storage_key(tensor)) not in self._found:
                self._made[key] = StorageWeakRef(tensor.untyped_storage())
        if func.namespace != "profiler" and (clause := self._clause(func, args, kwargs, inputs, outputs)):
            self.refusals.append(f"{clause} ({func}{_users_line()})")
        return result

    def _clause(
        self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], inputs: list[Tensor], outputs: list[Tensor]
    ) -> str:
        """Return why an operation cannot be captured; empty if it can."""
        if func.namespace in COMMUNICATION:
            return "it communicates with other processes"
        if torch.Tag.data_dependent_output in func.tags:
            return "it reads a value back to the host"
        if _has_dynamic_size(func, inputs):
            return "it makes a tensor whose size depends on values"
        if func is _aten.lift_fresh.default:
            return "it makes a tensor of Python numbers, which would never change; make it beforehand"
        if any(tensor.device != self._device for tensor in inputs):
            return f"it reads a tensor that is not on {self._device}"
        if any(tensor.device != self._device for tensor in outputs):
            return f"it makes a tensor that is not on {self._device}"
        if any(_is_own_generator(value) for value in (*args, *kwargs.values())):
            return "it draws from a torch.Generator of its own; use the default one"
        return ""


def _host_randomness() -> list[Any]:
    """Return what changes if random numbers are drawn from Python's or NumPy's default generators."""
    numpy = sys.modules.get("numpy")
    state = numpy.random.get_state() if numpy is not None else ()
    return [random.getstate(), [str(part) for part in state]]


def _has_dynamic_size(func: Any, inputs: Iterable[Tensor]) -> bool:
    if func in INDEXING:
        return any(tensor.dtype in (torch.bool, torch.uint8) for tensor in list(inputs)[1:])
    return torch.Tag.dynamic_output_shape in func.tags


def _is_own_generator(value: object) -> bool:
    if not isinstance(value, torch.Generator):
        return False
    defaults = (torch.default_generator, *torch.cuda.default_generators)
    return all(value is not default for default in defaults)


def _storage_key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _users_line() -> str:
    """Return the innermost line of code that is neither PyTorch's nor this package's; empty if there is none."""
    for frame in reversed(traceback.extract_stack()):
        if not frame.filename.startswith((*LIBRARIES, "<")):
            return f", {Path(frame.filename).name}:{frame.lineno}"
    return ""
