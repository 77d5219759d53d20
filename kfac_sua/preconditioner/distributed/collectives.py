"""Collective calls between the processes that share a mini-batch, with the bytes that each hands over counted."""

from collections import Counter
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


class Processes:
    """The processes that share a mini-batch.

    Args:
        group: Their process group.

    Attributes:
        rank: Rank of this process in the group.
        size: Number of processes.
        sent_bytes: Bytes that this process has handed to the collectives, by what they hold.
        statistics_bytes: Those of the last measurement of the statistics alone; ``None`` before the first.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self.sent_bytes: Counter[str] = Counter()
        self.statistics_bytes: int | None = None

    def locate_examples(self, num_examples: int, device: torch.device) -> tuple[int, int]:
        """Return how many examples the processes of lower rank have, and how many all processes have."""
        counts = [count for ((count,),) in self.all_gather_integers([[num_examples]], device, "examples")]
        return sum(counts[: self.rank]), sum(counts)

    def all_gather_integers(
        self, values: Sequence[Sequence[int]], device: torch.device, what: str
    ) -> list[list[list[int]]]:
        """Return the integers of all processes on the host, by rank; waits for the device.

        Args:
            values: Those of this process, in rows of one length.
            device: Where they are gathered.
            what: What they hold, for :attr:`sent_bytes`.
        """
        gathered = self.all_gather(torch.tensor(values, device=device), what)
        integers: list[list[list[int]]] = torch.stack(gathered).tolist()  # [processes, rows, integers]
        return integers

    def all_gather(self, values: Tensor, what: str) -> list[Tensor]:
        """Return the values of all processes, by rank.

        Args:
            values: Those of this process; shape and dtype must be the same on all.
            what: What they hold, for :attr:`sent_bytes`.
        """
        self.sent_bytes[what] += values.numel() * values.itemsize
        received = [torch.empty_like(values) for _ in range(self.size)]
        dist.all_gather(received, values.contiguous(), group=self._group)
        return received

    def all_reduce_(self, values: Tensor, what: str) -> None:
        """Replace a contiguous tensor by its sum over all processes.

        Args:
            values: The tensor, of one shape and dtype on all processes.
            what: What it holds, for :attr:`sent_bytes`.
        """
        self.sent_bytes[what] += values.numel() * values.itemsize
        dist.all_reduce(values, group=self._group)

    def mean(self, values: Tensor) -> Tensor:
        """Return the mean of a tensor over all processes; it must have one shape and dtype on all."""
        total = values.clone()
        self.all_reduce_(total, "means")
        return total / self.size


def default_processes() -> Processes | None:
    """Return the processes of the default group, or ``None`` if there is no group of more than one."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return None
    assert dist.group.WORLD is not None
    return Processes(dist.group.WORLD)
