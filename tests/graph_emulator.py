"""What a CUDA graph does, on a CPU: a step's operations recorded once and carried out again in the same memory.

A graph holds addresses and numbers, and so does a recording. Tensors that the step made belong to it. Those that it
found are held weakly, and a replay fails if one has been freed. After every replay, all memory that the recording made
and that nobody declared as a result is filled with NaN, and before one, all that an eager step left in shared memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

aten = torch.ops.aten
HOST_READS = {Tensor.tolist, Tensor.numpy, Tensor.__array__}
"""Reads that reach the memory of a CPU tensor without an operation; of a CUDA tensor they copy it first."""

UNDEFINED = {aten.empty.memory_format, aten.empty_like.default, aten.empty_strided.default, aten.new_empty.default}


class CaptureError(RuntimeError):
    """The step did what no graph can hold."""


class DanglingError(AssertionError):
    """A replay would read memory that has been freed."""


@dataclass
class Found:
    """A tensor that the step found: where it lies, not itself."""

    storage: StorageWeakRef
    dtype: torch.dtype
    offset: int
    shape: torch.Size
    stride: tuple[int, ...]

    def tensor(self) -> Tensor:
        """Return the tensor, if it is still there."""
        if self.storage.expired():
            raise DanglingError(f"a replay reads a freed tensor, {self.dtype} {list(self.shape)}")
        storage = torch.UntypedStorage._new_with_weak_ptr(self.storage.cdata)
        return torch.empty(0, dtype=self.dtype).set_(storage, self.offset, self.shape, self.stride)


@dataclass
class Operation:
    """An operation with its arguments, and the tensors that it made, by their place among its results."""

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    made: list[tuple[int, Tensor]]

    def carry_out(self) -> None:
        """Carry it out again, on what lies where the arguments lay, into what it made."""
        kwargs = {key: present(value) for key, value in self.kwargs.items()}
        result = self.func(*present(self.args), **kwargs)
        results = result if isinstance(result, list | tuple) else [result]
        for place, tensor in self.made:
            tensor.copy_(results[place])


def present(value: Any) -> Any:
    """Return an argument with the tensors in place of where they lie."""
    if isinstance(value, Found):
        return value.tensor()
    return type(value)(map(present, value)) if isinstance(value, list | tuple) else value


class Recorder(TorchDispatchMode):
    """Records the operations inside, carrying them out."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []
        self.made: dict[int, torch.UntypedStorage] = {}
        self.found: dict[int, tuple[StorageWeakRef, torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Record one operation."""
        kwargs = kwargs or {}
        inputs = tensors_in((args, kwargs))
        refuse(func, inputs)
        for tensor in inputs:
            storage = tensor.untyped_storage()
            if storage._cdata not in self.made and storage._cdata not in self.found:
                self.found[storage._cdata] = StorageWeakRef(storage), storage.clone()
        out = func(*args, **kwargs)
        known = {tensor.untyped_storage()._cdata for tensor in inputs}
        outputs = out if isinstance(out, list | tuple) else [out]
        made = []
        for place, tensor in enumerate(outputs):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in known:
                self.made[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
                made.append((place, self._kept(tensor)))
        if func.namespace != "profiler" and (made or func._schema.is_mutable):  # else it is a view
            kept = [] if func in UNDEFINED else made
            self.operations.append(Operation(func, *tree_map_only(Tensor, self._kept, (args, kwargs)), kept))
        return out

    def _kept(self, tensor: Tensor) -> Tensor | Found:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.made:
            reference = self.found[storage._cdata][0]
            return Found(reference, tensor.dtype, tensor.storage_offset(), tensor.shape, tensor.stride())
        bare = torch.empty(0, dtype=tensor.dtype)  # without a history
        with torch._C._DisableTorchDispatch():
            return bare.set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())

    def undo(self) -> None:
        """Put back what the operations wrote into what they found: a capture carries nothing out."""
        for reference, before in self.found.values():
            if not reference.expired():
                torch.UntypedStorage._new_with_weak_ptr(reference.cdata).copy_(before)

    @torch.no_grad()
    @torch.autocast("cpu", enabled=False)  # what a region around the capture cast has been cast
    def replay(self) -> None:
        """Carry the operations out in the memory of the recording."""
        for reference, _ in self.found.values():
            if reference.expired():
                raise DanglingError("a replay reads a freed tensor")
        for operation in self.operations:
            operation.carry_out()


class HostReads(TorchFunctionMode):
    """Refuses reads inside that are no operation."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Refuse or pass on."""
        if func in HOST_READS:
            raise CaptureError(f"host read: {func.__name__}")
        return func(*args, **(kwargs or {}))


class MadeStorages(TorchDispatchMode):
    """Notes the storages that the operations inside make."""

    def __init__(self) -> None:
        super().__init__()
        self.references: dict[int, StorageWeakRef] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note what one operation makes."""
        kwargs = kwargs or {}
        known = {tensor.untyped_storage()._cdata for tensor in tensors_in((args, kwargs))}
        out = func(*args, **kwargs)
        for tensor in tensors_in(out):
            if tensor.untyped_storage()._cdata not in known:
                self.references[tensor.untyped_storage()._cdata] = StorageWeakRef(tensor.untyped_storage())
        return out

    def alive(self) -> dict[int, StorageWeakRef]:
        """Return those that are still there."""
        return {key: reference for key, reference in self.references.items() if not reference.expired()}


class EmulatedGraph:
    """A ``StepGraph`` for CPU tensors.

    Attributes:
        num_operations: Operations of the captured step.
    """

    def __init__(self) -> None:
        self._recorder: Recorder | None = None
        self._declared: set[int] = set()
        self._left: MadeStorages | None = None
        self.num_operations = 0

    def run(self, function: Callable[[], Any], *, is_shared: bool) -> Any:
        """Run a function eagerly; what it makes shares the recording's memory."""
        self._left = None
        if self._recorder is None or not is_shared:
            return function()
        self._left = MadeStorages()
        with self._left:
            return function()

    def has_left(self, kept: Iterable[Tensor]) -> bool:
        """Whether the last run left tensors other than these."""
        if self._left is None:
            return False
        return bool(self._left.alive().keys() - {tensor.untyped_storage()._cdata for tensor in kept})

    def capture(self, function: Callable[[], Any]) -> Any:
        """Record a function, and undo what it did."""
        recorder, generator = Recorder(), torch.get_rng_state()
        try:
            with HostReads(), recorder:
                result = function()
        finally:
            recorder.undo()
            torch.set_rng_state(generator)
        self._recorder, self._left = recorder, None
        self._declared = {tensor.untyped_storage()._cdata for tensor in tensors_in(result)}
        self.num_operations = len(recorder.operations)
        self._poison(set())
        return result

    def replay(self) -> None:
        """Carry the recording out."""
        assert self._recorder is not None
        if self._left is not None:
            for reference in self._left.alive().values():
                torch.UntypedStorage._new_with_weak_ptr(reference.cdata).fill_(0xFF)
        self._recorder.replay()
        self._poison(self._declared)

    def release(self) -> None:
        """Forget the recording."""
        self._recorder = self._left = None

    def _poison(self, spared: set[int]) -> None:
        assert self._recorder is not None
        for key, storage in self._recorder.made.items():
            if key not in spared:
                storage.fill_(0xFF)  # NaN in every floating-point type, -1 in every integer type


def refuse(func: Any, inputs: list[Tensor]) -> None:
    """Raise where an operation reads back, copies from the host, or makes something whose size depends on values."""
    has_index_of_bool = any(tensor.dtype is torch.bool for tensor in inputs[1:])
    if torch.Tag.data_dependent_output in func.tags:
        raise CaptureError(f"host read: {func}")
    if func is aten.lift_fresh.default:
        raise CaptureError(f"copy from the host: {func}")
    if func in (aten.index.Tensor, aten.index_put_.default, aten.index_put.default):
        if has_index_of_bool:
            raise CaptureError(f"size depends on values: {func}")
    elif torch.Tag.dynamic_output_shape in func.tags:
        raise CaptureError(f"size depends on values: {func}")


def tensors_in(values: Any) -> list[Tensor]:
    """Return the tensors in nested values."""
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
