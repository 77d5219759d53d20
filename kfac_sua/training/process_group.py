"""The processes that carry out one run together, each with a part of every mini-batch; usually there is just one.

All processes take the same steps. Only the main process (rank 0) reads and writes the run's directory; it broadcasts
what the others need to know. Decisions about how a run goes on are all-reduced.
"""

import contextlib
import gc
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from kfac_sua.config import ConfigError
from kfac_sua.runs.run_info import failure_reason
from kfac_sua.training.connection import TIMEOUT, connection_errors, interruptible
from kfac_sua.training.launch import Launch

LONG_TIMEOUT = timedelta(days=1)
"""The timeout while the main process downloads a data set that the others wait for."""

EXIT_GRACE_S = 10.0
"""Time to report an error after SIGTERM: torchrun sends it to all processes as soon as one has ended."""

Result = TypeVar("Result")


class OtherProcessError(Exception):
    """Another process has failed, which reports the reason itself."""


class ProcessGroup:
    """The collective operations of a run; every process has to make the same calls. With one process they do nothing.

    Args:
        rank: Rank of this process.
        size: Number of processes.
        control: A gloo group of all processes, for objects and numbers on the CPU; ``None`` for one process.
    """

    def __init__(self, rank: int = 0, size: int = 1, control: dist.ProcessGroup | None = None) -> None:
        self.rank = rank
        self.size = size
        self._control = control
        self._pending: tuple[Tensor, dist.Work] | None = None

    @property
    def is_main_process(self) -> bool:
        """Whether this is the process that reads, writes and prints."""
        return self.rank == 0

    @property
    def part(self) -> tuple[int, int]:
        """Rank and number of processes: which part of every mini-batch is this process's own."""
        return self.rank, self.size

    def with_long_timeout(self) -> "ProcessGroup":
        """Return the same processes with :data:`LONG_TIMEOUT`."""
        if self._control is None:
            return self
        control = dist.new_group(backend="gloo", timeout=LONG_TIMEOUT)
        assert isinstance(control, dist.ProcessGroup)
        return ProcessGroup(self.rank, self.size, control)

    def print_on_main(self, text: str) -> None:
        """Print a line on the main process."""
        if self.is_main_process:
            print(text, flush=True)

    def broadcast(self, work: Callable[[], Result]) -> Result:
        """Call a function on the main process and broadcast its result.

        Args:
            work: The function; with several processes its result must be picklable.

        Returns:
            The result, on all processes.

        Raises:
            OtherProcessError: On the other processes, if the function fails; the main process raises the error itself.
        """
        if self._control is None:
            return work()
        if self.is_main_process:
            try:
                result = work()
            except Exception as error:
                self._broadcast_object((None, failure_reason(error)))
                raise
            self._broadcast_object((result, None))
            return result
        result, reason = self._broadcast_object(None)
        if reason is not None:
            raise OtherProcessError(reason)
        return result

    def run_on_all(self, work: Callable[[], Result]) -> Result:
        """Call a function on every process; if it fails on one of them, raise on all.

        Args:
            work: The function; it must not call a collective operation.

        Returns:
            This process's result.

        Raises:
            OtherProcessError: If it fails on other processes only, or if the main process reports the same error.
        """
        if self._control is None:
            return work()
        try:
            result = work()
        except Exception as error:
            reason = failure_reason(error)
            first = self.all_gather(reason)[0]
            if not self.is_main_process and first == reason:
                raise OtherProcessError(reason) from error
            raise
        for other in self.all_gather(""):
            if other:
                raise OtherProcessError(other)
        return result

    def all_gather(self, value: Result) -> list[Result]:
        """Return the values of all processes, by rank; with several processes they must be picklable."""
        if self._control is None:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._control)
        return values

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        """Return the sum of a tensor over all processes; the tensor is on the training device and stays as it is."""
        if self._control is None:
            return values
        total = values.clone()
        dist.all_reduce(total)
        return total

    def share_of(self, total: Tensor) -> Tensor:
        """Return this process's share of a sum, so that all shares add up to it: all on the main process, else zero."""
        return total if self.is_main_process else torch.zeros_like(total)

    def data_parallel(self, model: nn.Module, *, broadcast_buffers: bool) -> nn.Module:
        """Return the model wrapped in ``DistributedDataParallel``, or itself for one process.

        Args:
            model: The model.
            broadcast_buffers: Whether every forward pass begins with the main process's buffers; needed unless the
                model keeps them equal on all processes itself.
        """
        if self._control is None:
            return model
        return DistributedDataParallel(model, gradient_as_bucket_view=True, broadcast_buffers=broadcast_buffers)

    def broadcast_buffers(self, model: nn.Module) -> None:
        """Broadcast the main process's buffers (running statistics), so that all evaluate the same model."""
        if self._control is not None:
            for buffer in model.buffers():
                dist.broadcast(buffer, src=0)

    def any(self, flag: bool) -> bool:
        """Return whether the flag is true on any process."""
        return self.all_reduce_max(int(flag)) > 0

    def all_reduce_max(self, number: int) -> int:
        """Return the largest number of any process."""
        if self._control is None:
            return number
        value = torch.tensor(number)
        dist.all_reduce(value, dist.ReduceOp.MAX, group=self._control)
        return int(value)

    def delayed_all_reduce_max(self, number: int) -> int:
        """Return the largest number of the previous call, 0 in the first call; with one process, the number given now.

        The reduction runs during the next mini-batch, so that no process waits for another one's mini-batch here.
        """
        if self._control is None:
            return number
        before, value = self._pending, torch.tensor(number)
        work = dist.all_reduce(value, dist.ReduceOp.MAX, group=self._control, async_op=True)
        assert work is not None
        self._pending = value, work
        if before is None:
            return 0
        before[1].wait()
        return int(before[0])

    def discard_delayed(self) -> None:
        """Drop the numbers of the previous :meth:`delayed_all_reduce_max`, as what they asked for has been done."""
        if self._pending is not None:
            self._pending[1].wait()
        self._pending = None

    def _broadcast_object(self, value: Any) -> Any:
        """Return the value of the main process."""
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self._control)
        return values[0]


@contextlib.contextmanager
def open_process_group(launch: Launch, device: torch.device, store: dist.Store | None = None) -> Iterator[ProcessGroup]:
    """Initialise the process group of a run, and destroy it at the end.

    Args:
        launch: Rank of this process, and address of the main process.
        device: Where to train; on a machine with several GPUs each process takes the GPU of its local rank.
        store: The store of the rendezvous; ``None`` lets PyTorch open one.

    Yields:
        The processes.

    Raises:
        ConfigError: If there are more processes than GPUs.
        ConnectionLostError: If another process does not join, ends, or does not answer.
    """
    if launch.world_size == 1:
        yield ProcessGroup()
        return
    if device.type == "cuda":
        _select_gpu(launch)
    if launch.rank > 0:  # every process would log the same warnings about the network
        logging.getLogger("kfac_sua").setLevel(logging.ERROR)
    with connection_errors(launch.rank, launch.world_size):
        with interruptible():
            os.environ |= {"MASTER_ADDR": launch.master_address, "MASTER_PORT": str(launch.master_port)}
            backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
            rank, size = launch.rank, launch.world_size
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
            control = dist.new_group(backend="gloo", timeout=TIMEOUT)  # for what stays on the CPU
            assert isinstance(control, dist.ProcessGroup)
        signal.signal(signal.SIGTERM, _exit_after_grace)
        try:
            yield ProcessGroup(launch.rank, launch.world_size, control)
        finally:
            gc.collect()  # an object that still refers to the group would outlive its threads
            dist.destroy_process_group()


def _select_gpu(launch: Launch) -> None:
    num_gpus = torch.cuda.device_count()
    if launch.local_rank >= num_gpus:
        raise ConfigError(
            f"device=cuda with at least {launch.local_rank + 1} processes on a machine that has {num_gpus} CUDA "
            f"devices; start at most {num_gpus} per machine (--nproc_per_node)."
        )
    torch.cuda.set_device(launch.local_rank)


def _exit_after_grace(number: int, frame: FrameType | None) -> None:
    """Handle SIGTERM before and after training; while a run trains, ``StopRequest`` handles it."""
    del frame
    timer = threading.Timer(EXIT_GRACE_S, os._exit, (128 + number,))
    timer.daemon = True
    timer.start()
