"""Capture and replay of a step: the protocol, and CUDA graphs.

A graph records kernels with the addresses that they read and write. Its intermediate results lie in a memory pool of
their own, which is idle between two replays. An eager step, such as a refresh, needs memory for the same activations,
so it runs in that pool too: otherwise captured training would take most of its memory twice. The next replay overwrites
what such a step leaves in the pool. ``has_left`` tells whether it has left anything, and its caller must ask.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class StepGraph(Protocol):
    """Captures what a function does on a device, and replays it. It holds one capture at a time."""

    def run(self, function: Callable[[], T], *, is_shared: bool) -> T:
        """Run a function eagerly, in the memory of the capture if there is one and ``is_shared``."""

    def has_left(self, kept: Iterable[Tensor]) -> bool:
        """Whether the last :meth:`run` has left tensors in the memory of the capture other than these."""

    def capture(self, function: Callable[[], T]) -> T:
        """Record what a function does, without doing it, in place of what was captured before.

        Returns:
            Its result: tensors that every replay fills.
        """

    def replay(self) -> None:
        """Carry out what was captured."""

    def release(self) -> None:
        """Forget the capture, and free its memory."""


class CudaStepGraph:
    """A step as one CUDA graph.

    Args:
        device: The CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # Captures must not be on the default stream; and the allocator reuses memory within one stream only.
        self._stream = torch.cuda.Stream(device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._pool: torch.cuda.MemPool | None = None
        self._in_use_before: set[int] | None = None

    def run(self, function: Callable[[], T], *, is_shared: bool) -> T:
        """Run a function eagerly, in the memory of the capture if there is one and ``is_shared``."""
        with self._on_stream():
            self._in_use_before = None
            if self._pool is None or not is_shared:
                return function()
            self._in_use_before = self._blocks_in_use()
            # The pool serves one thread: the backward pass must not run in one of its own.
            with torch.cuda.use_mem_pool(self._pool), torch.autograd.set_multithreading_enabled(False):
                return function()

    def has_left(self, kept: Iterable[Tensor]) -> bool:
        """Whether the last :meth:`run` has left tensors in the memory of the capture other than these."""
        if self._in_use_before is None:
            return False
        expected = {tensor.untyped_storage().data_ptr() for tensor in kept}
        return bool(self._blocks_in_use() - self._in_use_before - expected)

    def capture(self, function: Callable[[], T]) -> T:
        """Record what a function does, without doing it, in place of what was captured before."""
        self.release()
        # The stream is set outside as well: a capture that fails does not put the caller's back.
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            self._pool = torch.cuda.MemPool()
            graph = self._graph = torch.cuda.CUDAGraph()
            pool: Any = self._pool.id  # releases before 2.14 take the number alone
            try:
                # "thread_local": what other threads do (pinned memory of a data loader) is no part of the step.
                with torch.cuda.graph(graph, pool=pool, stream=self._stream, capture_error_mode="thread_local"):
                    return function()
            except BaseException:
                self._recover(pool)
                raise

    def replay(self) -> None:
        """Carry out what was captured, on the caller's stream."""
        assert self._graph is not None
        self._graph.replay()

    def release(self) -> None:
        """Forget the capture, and free its memory."""
        graph, self._graph = self._graph, None
        try:
            if graph is not None:
                graph.reset()
        finally:
            self._pool = None  # after the graph, which holds it

    @contextmanager
    def _on_stream(self) -> Iterator[None]:
        with torch.cuda.device(self._device):
            callers = torch.cuda.current_stream(self._device)
            self._stream.wait_stream(callers)
            try:
                with torch.cuda.stream(self._stream):
                    yield
            finally:  # after Ctrl-C too, as a checkpoint must not read what is still being written
                callers.wait_stream(self._stream)

    def _recover(self, pool: Any) -> None:
        """Undo what a failed capture leaves in PyTorch's state."""
        index = torch.cuda.current_device()
        # Each call raises if the capture, or the call before, has undone its part already.
        with suppress(RuntimeError):
            self.release()
        with suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(index, pool)
            torch._C._cuda_releasePool(index, pool)
        generator = torch.cuda.default_generators[index]
        generator.graphsafe_set_state(generator.clone_state())  # the clone does not count offsets for a graph

    def _blocks_in_use(self) -> set[int]:
        """Return the addresses of the pool's blocks that are in use."""
        assert self._pool is not None
        segments: list[dict[str, Any]] = torch.cuda.memory_snapshot(self._pool.id)
        blocks = [block for segment in segments for block in segment["blocks"]]
        return {block["address"] for block in blocks if block["state"] == "active_allocated"}
