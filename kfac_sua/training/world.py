"""The processes that carry out one run together, each with a part of every mini-batch; mostly there is just one.

All processes take the same steps. The first one alone reads and writes the run's directory and tells the others what
they need to know; whatever decides where a run goes next is agreed upon.
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
from kfac_sua.training.contact import PATIENCE, interruptible, named_losses
from kfac_sua.training.launch import Launch

LONG_PATIENCE = timedelta(days=1)
"""The same while one fetches what the others wait for."""

LEAVING_TIME_S = 10.0

Result = TypeVar("Result")


class OtherProcessError(Exception):
    """Another process has failed, and says itself why."""


class World:
    """This process among those of a run.

    Args:
        rank: Its number, from 0.
        size: Number of processes.
        control: A group of all of them that works on the CPU; ``None`` for a process alone.
    """

    def __init__(self, rank: int = 0, size: int = 1, control: dist.ProcessGroup | None = None) -> None:
        self.rank = rank
        self.size = size
        self._control = control
        self._wishes: tuple[Tensor, dist.Work] | None = None

    @property
    def is_first(self) -> bool:
        """Whether this is the process that reads, writes and speaks."""
        return self.rank == 0

    @property
    def part(self) -> tuple[int, int]:
        """This process's number and how many there are: which part of a mini-batch is its own."""
        return self.rank, self.size

    def patiently(self) -> "World":
        """Return the same processes, who wait much longer for each other; all have to ask."""
        if self._control is None:
            return self
        control = dist.new_group(backend="gloo", timeout=LONG_PATIENCE)
        assert isinstance(control, dist.ProcessGroup)
        return World(self.rank, self.size, control)

    def say(self, text: str) -> None:
        """Print a line, once for all processes."""
        if self.is_first:
            print(text, flush=True)

    def from_first(self, work: Callable[[], Result]) -> Result:
        """Let the first process do something, and return its result on all.

        Args:
            work: What to do; its result must be picklable where there are several processes.

        Raises:
            OtherProcessError: On the others, if it fails; on the first, what it raises.
        """
        if self._control is None:
            return work()
        if self.is_first:
            try:
                result = work()
            except Exception as error:
                self._broadcast((None, failure_reason(error)))
                raise
            self._broadcast((result, None))
            return result
        result, reason = self._broadcast(None)
        if reason is not None:
            raise OtherProcessError(reason)
        return result

    def each(self, work: Callable[[], Result]) -> Result:
        """Let every process do something by itself; where it fails on one of them, all leave together.

        Args:
            work: What to do, without a word to the other processes.

        Raises:
            OtherProcessError: If it fails elsewhere only, or on the first process in the same way.
        """
        if self._control is None:
            return work()
        try:
            result = work()
        except Exception as error:
            reason = failure_reason(error)
            first = self.gather(reason)[0]
            if not self.is_first and first == reason:
                raise OtherProcessError(reason) from error
            raise
        for other in self.gather(""):
            if other:
                raise OtherProcessError(other)
        return result

    def gather(self, value: Result) -> list[Result]:
        """Return what each process gives, by rank; it must be picklable where there are several."""
        if self._control is None:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._control)
        return values

    def add_up(self, values: Tensor) -> Tensor:
        """Return the sum over all processes, of a tensor on the device that is trained on."""
        if self._control is None:
            return values
        total = values.clone()
        dist.all_reduce(total)
        return total

    def share_of(self, total: Tensor) -> Tensor:
        """Return this process's share of what was added up before: all of it on the first, zero on the others."""
        return total if self.is_first else torch.zeros_like(total)

    def averaging(self, model: nn.Module, *, shares_buffers: bool) -> nn.Module:
        """Return what a model is called through so that its gradients are averages over all processes.

        Args:
            model: The model.
            shares_buffers: Whether every forward pass begins with the first process's buffers, for a model that does
                not keep them alike by itself.
        """
        if self._control is None:
            return model
        return DistributedDataParallel(model, gradient_as_bucket_view=True, broadcast_buffers=shares_buffers)

    def share_buffers(self, model: nn.Module) -> None:
        """Give all processes the first one's running statistics of batch normalisation, so that all evaluate alike."""
        if self._control is not None:
            for buffer in model.buffers():
                dist.broadcast(buffer, src=0)

    def any(self, flag: bool) -> bool:
        """Say whether the flag is up on any process; all have to ask."""
        return self.largest(int(flag)) > 0

    def largest(self, wish: int) -> int:
        """Return the largest number that a process gives; all have to give one, and wait for the others."""
        if self._control is None:
            return wish
        value = torch.tensor(wish)
        dist.all_reduce(value, dist.ReduceOp.MAX, group=self._control)
        return int(value)

    def agree(self, wish: int) -> int:
        """Return the largest number that a process gave the last time, 0 the first time; alone, its own of now.

        That nobody waits for anybody's mini-batch costs one call's delay.
        """
        if self._control is None:
            return wish
        before, value = self._wishes, torch.tensor(wish)
        work = dist.all_reduce(value, dist.ReduceOp.MAX, group=self._control, async_op=True)
        assert work is not None
        self._wishes = value, work
        if before is None:
            return 0
        before[1].wait()
        return int(before[0])

    def forget_wishes(self) -> None:
        """Wait for the last wishes and pass them over, as when they have been fulfilled."""
        if self._wishes is not None:
            self._wishes[1].wait()
        self._wishes = None

    def _broadcast(self, value: Any) -> Any:
        """Return what the first process gives."""
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self._control)
        return values[0]


@contextlib.contextmanager
def open_world(launch: Launch, device: torch.device, store: dist.Store | None = None) -> Iterator[World]:
    """Become a group with the other processes of a run, if there are any.

    Args:
        launch: This process's place.
        device: Where each of them trains; of several GPUs of a machine each process takes its own.
        store: Where they have met; ``None`` if they have not.

    Yields:
        The processes.

    Raises:
        ConfigError: If there are more processes than GPUs.
        LostContactError: If another process does not come, goes, or does not answer.
    """
    if launch.size == 1:
        yield World()
        return
    if device.type == "cuda":
        _take_own_gpu(launch)
    if launch.rank > 0:  # what a process logs about the network, all would
        logging.getLogger("kfac_sua").setLevel(logging.ERROR)
    with named_losses(launch.rank, launch.size):
        with interruptible():
            control = _meet(launch, device, store)
        signal.signal(signal.SIGTERM, _leave_soon)
        try:
            yield World(launch.rank, launch.size, control)
        finally:
            gc.collect()  # what still refers to the group would outlive its threads
            dist.destroy_process_group()


def _meet(launch: Launch, device: torch.device, store: dist.Store | None) -> dist.ProcessGroup:
    """Wait until all processes are there, and return a group of them for the CPU."""
    os.environ |= {"MASTER_ADDR": launch.address, "MASTER_PORT": str(launch.port)}
    backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, store=store, rank=launch.rank, world_size=launch.size, timeout=PATIENCE)
    control = dist.new_group(backend="gloo", timeout=PATIENCE)
    assert isinstance(control, dist.ProcessGroup)
    return control


def _take_own_gpu(launch: Launch) -> None:
    num_gpus = torch.cuda.device_count()
    if launch.local_rank >= num_gpus:
        raise ConfigError(
            f"device=cuda with at least {launch.local_rank + 1} processes on a machine that has {num_gpus} CUDA "
            f"devices; start at most {num_gpus} per machine (--nproc_per_node)."
        )
    torch.cuda.set_device(launch.local_rank)


def _leave_soon(number: int, frame: FrameType | None) -> None:
    """End this process, with time to say why: torchrun sends SIGTERM to all as soon as one has ended.

    While a run trains, ``StopRequest`` answers the signal.
    """
    del frame
    timer = threading.Timer(LEAVING_TIME_S, os._exit, (128 + number,))
    timer.daemon = True
    timer.start()
