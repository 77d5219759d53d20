"""How long to wait for the other processes of a run, and how to tell that one has ended."""

import contextlib
import signal
from collections.abc import Iterator
from datetime import timedelta

import torch.distributed as dist

from kfac_sua.training.signals import STOP_SIGNALS

TIMEOUT = timedelta(minutes=5)
"""How long a process waits for another one. One that dies is noticed at once, because its connections close."""


class ConnectionLostError(Exception):
    """Another process of the run has ended or does not answer; the message is one sentence."""


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Let signals end this process at once, even while it waits in C++; nothing is on disk yet."""
    numbers = [number for number in STOP_SIGNALS if callable(signal.getsignal(number))]
    before = {number: signal.signal(number, signal.SIG_DFL) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def connection_errors(rank: int, size: int) -> Iterator[None]:
    """Raise ConnectionLostError in place of the errors that torch.distributed raises when another process has ended."""
    try:
        yield
    except RuntimeError as error:
        if size == 1 or not _is_lost_connection(error):
            raise
        raise ConnectionLostError(
            f"process {rank} of {size} has lost contact with another one, which has ended or does not answer; the same "
            f"command resumes the run from its last checkpoint."
        ) from error


def _is_lost_connection(error: RuntimeError) -> bool:
    text = str(error).lower()
    is_distributed = isinstance(error, dist.DistError) or "gloo" in text or "nccl" in text
    return is_distributed and any(words in text for words in _LOST_CONNECTION)


# Parts of what gloo, NCCL and the store report when a process has ended or is silent. Their other errors are bugs, and
# are not replaced.
_LOST_CONNECTION = (
    *("connection closed", "connection reset", "connection refused", "broken pipe", "socket"),
    *("read error", "write error", "timed out", "timeout", "remote process exited", "aborted"),
)
