"""Waiting for the other processes of a run, and noticing that one has gone."""

import contextlib
import signal
from collections.abc import Iterator
from datetime import timedelta

import torch.distributed as dist

from kfac_sua.training.signals import STOP_SIGNALS

PATIENCE = timedelta(minutes=5)
"""How long the others may keep a process waiting. One that dies is noticed at once, as its connections close."""


class LostContactError(Exception):
    """Another process of the run has gone or does not answer; the message is one sentence."""


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Let signals end this process at once, even while it waits outside of Python; nothing is on disk yet."""
    numbers = [number for number in STOP_SIGNALS if callable(signal.getsignal(number))]
    before = {number: signal.signal(number, signal.SIG_DFL) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def named_losses(rank: int, size: int) -> Iterator[None]:
    """Raise LostContactError where other processes have gone, which torch.distributed says in many ways."""
    try:
        yield
    except RuntimeError as error:
        if size == 1 or not _is_loss(error):
            raise
        raise LostContactError(
            f"process {rank} of {size} has lost contact with another one, which has ended or does not answer; the same "
            f"command resumes the run from its last checkpoint."
        ) from error


def _is_loss(error: RuntimeError) -> bool:
    text = str(error).lower()
    is_distributed = isinstance(error, dist.DistError) or "gloo" in text or "nccl" in text
    return is_distributed and any(words in text for words in _WORDS_OF_LOSS)


# What gloo, NCCL and the store say of a process that is gone or silent. Other errors of theirs are bugs, and stay.
_WORDS_OF_LOSS = (
    *("connection closed", "connection reset", "connection refused", "broken pipe", "socket"),
    *("read error", "write error", "timed out", "timeout", "remote process exited", "aborted"),
)
