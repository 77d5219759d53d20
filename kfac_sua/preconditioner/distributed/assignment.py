"""Assignment of the blocks of a refresh to the processes that invert them, computed alike on all of them.

The blocks of a factor are alike, so all of them are shared out or none is. Sharing a block out saves each of N
processes (1 − 1/N) of its FLOPs on average and costs the bytes of its inverse on the network; a machine balance in
FLOPs per byte compares the two. Shared blocks go, in the order of falling FLOPs, to the process with the least work so
far (longest processing time first: at most 4/3 of the shortest possible time; Graham 1969).
"""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kfac_sua.preconditioner.forms import BlockMessage, DenseFactor, EigenBasis, Factor, RefreshResult
from kfac_sua.preconditioner.plain_numbers import plain_number, shown

FLOPS_PER_BYTE = {"cpu": 25.0, "cuda": 50.0}
"""FLOPs of inversion that a process does while it receives a byte of an inverse, by type of device.

CPU, measured: one core inverts blocks of width 256 to 1024 at 21 to 38 GFLOP/s (4 GFLOP/s at width 32), and gloo
delivers 1.2 GB/s between processes of one machine, as would 10 Gb/s Ethernet. CUDA, estimated and not measured: some
2.5 TFLOP/s of batched Cholesky inverses in float32 over the 50 GB/s of 400 Gb/s InfiniBand; within NVLink, a tenth.
"""

NUM_COUNTS = 3
"""Numbers sent with the blocks of a factor: how many failed, how many needed more damping, and how much more."""


@dataclass(frozen=True)
class Work:
    """The inversion of one factor.

    Args:
        num_blocks: Its blocks, all alike.
        flops: FLOPs per block.
        form: The message of a block's inverse.
        dtype: Precision in which it is kept and sent.
    """

    num_blocks: int
    flops: int
    form: BlockMessage
    dtype: torch.dtype

    @classmethod
    def of(cls, factor: Factor, *, is_eigenbasis: bool) -> "Work":
        """Count the work on a factor: on its inverse, in the form that the factor has, or on its eigenbasis."""
        return cls.making(EigenBasis if is_eigenbasis else factor.inverse_form, factor)

    @classmethod
    def making(cls, kind: type[RefreshResult], factor: Factor) -> "Work":
        """Count the work on an inverse, or an eigenbasis, of a factor."""
        return cls(factor.num_blocks, kind.flops_of(factor), kind.message_of(factor), factor.values.dtype)

    @classmethod
    def dense(cls, blocks: tuple[int, int], dtype: torch.dtype, *, is_eigenbasis: bool) -> "Work":
        """Count the work on ``(number, width)`` dense blocks: their inverses, or their eigenbases."""
        num_blocks, width = blocks
        factor = DenseFactor.zeros(num_blocks, width, torch.empty(0, dtype=dtype, device="meta"))  # a shape only
        return cls.of(factor, is_eigenbasis=is_eigenbasis)

    @property
    def block_bytes(self) -> int:
        """Bytes that the inverse of a block is sent as."""
        return self.form.numbers * self.dtype.itemsize


@dataclass(frozen=True)
class Assignment:
    """The assignment of a refresh.

    Args:
        works: The factors.
        shares: For each factor, the number of its blocks that each process inverts, by rank; ``None`` if every process
            inverts all of them.
        num_processes: N.
    """

    works: tuple[Work, ...]
    shares: tuple[tuple[int, ...] | None, ...]
    num_processes: int

    def blocks_of(self, factor: int, rank: int) -> slice:
        """Return the blocks of a shared factor that a process inverts."""
        shares = self.shares[factor]
        assert shares is not None
        start = sum(shares[:rank])
        return slice(start, start + shares[rank])

    def factors_of(self, rank: int, dtype: torch.dtype) -> list[int]:
        """Return the shared factors of which a process inverts blocks."""
        return [i for i, shares in enumerate(self.shares) if shares and shares[rank] and self.works[i].dtype == dtype]

    @property
    def dtypes(self) -> list[torch.dtype]:
        """Precisions of the shared factors; there is one message for each."""
        return list(dict.fromkeys(work.dtype for work, shares in zip(self.works, self.shares, strict=True) if shares))

    def parts(self, dtype: torch.dtype) -> list[int]:
        """Return the numbers that each process sends, by rank."""
        return [
            sum(NUM_COUNTS + self._share(i, rank) * self.works[i].form.numbers for i in self.factors_of(rank, dtype))
            for rank in range(self.num_processes)
        ]

    def is_summed(self, dtype: torch.dtype) -> bool:
        """Return whether messages are exchanged by an all-reduce, in which each process adds zeros to the others'.

        An all-reduce moves every number twice. An all-gather moves every message as if it were the longest, which is
        more if few processes have most to send, as for a model with fewer wide blocks than processes.
        """
        parts = self.parts(dtype)
        return self.num_processes * max(parts) > 2 * sum(parts)

    @property
    def sent_bytes(self) -> int:
        """Bytes that each process hands to the collectives."""
        total = 0
        for dtype in self.dtypes:
            parts = self.parts(dtype)
            total += dtype.itemsize * (sum(parts) if self.is_summed(dtype) else max(parts))
        return total

    @property
    def received_bytes(self) -> float:
        """Bytes that each process receives, if collectives are carried out in a ring."""
        others, total = self.num_processes - 1, 0.0
        for dtype in self.dtypes:
            parts = self.parts(dtype)
            summed, gathered = 2 * others / self.num_processes * sum(parts), others * max(parts)
            total += dtype.itemsize * (summed if self.is_summed(dtype) else gathered)
        return total

    @property
    def flops_alone(self) -> int:
        """FLOPs of a process that inverts everything."""
        return sum(work.num_blocks * work.flops for work in self.works)

    def flops_of(self, rank: int) -> int:
        """FLOPs of one process."""
        return sum(self._share(i, rank) * work.flops for i, work in enumerate(self.works))

    @property
    def most_flops(self) -> int:
        """FLOPs of the process with the most work."""
        return max(self.flops_of(rank) for rank in range(self.num_processes))

    @property
    def num_shared(self) -> int:
        """Blocks that one process inverts for all."""
        return sum(work.num_blocks for work, shares in zip(self.works, self.shares, strict=True) if shares)

    @property
    def num_everywhere(self) -> int:
        """Blocks that every process inverts."""
        return sum(work.num_blocks for work in self.works) - self.num_shared

    def _share(self, factor: int, rank: int) -> int:
        shares = self.shares[factor]
        return self.works[factor].num_blocks if shares is None else shares[rank]


def checked_flops_per_byte(flops_per_byte: object) -> float | None:
    """Return a machine balance as a Python number, or ``None``.

    Raises:
        ValueError: Unless it is ``None``, a number ≥ 0 or infinite.
    """
    if flops_per_byte is None:
        return None
    number = plain_number(flops_per_byte)
    if number is None or not number >= 0:
        raise ValueError(
            f"flops_per_byte must be a number >= 0 (0 shares out every inverse, inf none) or None (the device's own), "
            f"got {shown(flops_per_byte) if number is None else number}."
        )
    return number


def machine_balance(device: torch.device, flops_per_byte: float | None) -> float:
    """Return the machine balance to plan with: the given one, or that of the device's type.

    Raises:
        ValueError: If none is given and none is known.
    """
    if flops_per_byte is not None:
        return flops_per_byte
    if device.type not in FLOPS_PER_BYTE:
        known = ", ".join(FLOPS_PER_BYTE)
        raise ValueError(
            f"No machine balance is known for device {device.type} (only for {known}); give flops_per_byte."
        )
    return FLOPS_PER_BYTE[device.type]


def plan_assignment(works: Sequence[Work], num_processes: int, flops_per_byte: float) -> Assignment:
    """Decide which factors are shared out, and share out their blocks.

    Args:
        works: The factors of a refresh.
        num_processes: N ≥ 1.
        flops_per_byte: Machine balance, ≥ 0: 0 shares out everything, infinity nothing.

    Returns:
        The assignment, which depends on nothing else. It shares nothing out if that would not be cheaper on the whole,
        as when one block is most of the work.
    """
    nothing = Assignment(tuple(works), (None,) * len(works), num_processes)
    if num_processes == 1 or math.isinf(flops_per_byte):
        return nothing
    saved_share = 1 - 1 / num_processes
    worthwhile = [i for i, one in enumerate(works) if one.flops * saved_share > one.block_bytes * flops_per_byte]
    if not worthwhile:
        return nothing
    shares = _assigned(works, worthwhile, num_processes)
    plan = Assignment(tuple(works), tuple(shares.get(i) for i in range(len(works))), num_processes)
    cost = plan.most_flops + flops_per_byte * plan.received_bytes
    return nothing if cost > plan.flops_alone else plan


def _assigned(works: Sequence[Work], chosen: Sequence[int], num_processes: int) -> dict[int, tuple[int, ...]]:
    """Assign each block, by falling FLOPs, to the process with the fewest so far; return counts by rank."""
    loads = [(0, rank) for rank in range(num_processes)]  # a heap: among equals, the lowest rank
    shares = {}
    for i in sorted(chosen, key=lambda i: (-works[i].flops, i)):
        counts = [0] * num_processes
        for _ in range(works[i].num_blocks):
            load, rank = loads[0]
            counts[rank] += 1
            heapq.heapreplace(loads, (load + works[i].flops, rank))
        shares[i] = tuple(counts)
    return shares
