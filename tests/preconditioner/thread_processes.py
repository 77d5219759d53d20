"""Processes as threads of one process, so that a test of what they exchange starts none."""

import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from kfac_sua.preconditioner.distributed.collectives import Processes


class ThreadProcesses(Processes):
    """One of several threads that gather from each other.

    Args:
        rank: Which.
        board: Where each puts what it sends.
        barrier: What all wait at.
    """

    def __init__(self, rank: int, board: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.size = rank, len(board)
        self.sent_bytes: Counter[str] = Counter()
        self.statistics_bytes = None
        self._board, self._barrier = board, barrier

    def all_gather(self, values: torch.Tensor, what: str) -> list[torch.Tensor]:
        """Return the values of all threads, which must be alike in shape and dtype."""
        self.sent_bytes[what] += values.numel() * values.itemsize
        self._board[self.rank] = values
        self._barrier.wait()
        received = [sent.clone() for sent in self._board]
        self._barrier.wait()
        assert {(sent.shape, sent.dtype) for sent in received} == {(values.shape, values.dtype)}
        return received

    def all_reduce_(self, values: torch.Tensor, what: str) -> None:
        """Replace a tensor by its sum over all threads."""
        values.copy_(torch.stack(self.all_gather(values, what)).sum(0))


def run_ranks(size: int, work: Callable[[Processes], Any]) -> list[Any]:
    """Return what the work gives on each of so many ranks; one that fails frees the others."""
    board, barrier = [None] * size, threading.Barrier(size, timeout=60)

    def rank_work(rank: int) -> Any:
        try:
            return work(ThreadProcesses(rank, board, barrier))
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(rank_work, range(size)))
