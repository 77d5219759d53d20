"""One process per run directory: a second one leaves with a sentence instead of mixing its records in."""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from kfac_sua.runs.atomic import named_in_errors
from kfac_sua.runs.openers import own_file


class RunBusyError(Exception):
    """A run that another process is carrying out; the message is one sentence."""


class RunLostError(RunBusyError):
    """A run whose directory is no longer the one that was locked."""


@dataclass(frozen=True)
class Hold:
    """A lock that is held.

    Args:
        path: The lock's file.
        file: The same, open.
    """

    path: Path
    file: TextIO

    def check(self) -> None:
        """Raise :class:`RunLostError` if the directory was removed or replaced: what is there may be another's."""
        if not is_at(self.path, self.file):
            raise RunLostError(f"{self.path.parent} was removed or replaced; this process writes nothing more.")


@contextmanager
def exclusive(directory: Path) -> Iterator[Hold]:
    """Hold a run directory for this process; the lock goes with the process, however it ends.

    Args:
        directory: The run directory, made if missing.

    Yields:
        The lock, to be checked before each write.

    Raises:
        RunBusyError: If another process holds it.
        OSError: If it cannot be made or written to, or its file is a link.
    """
    path = directory / ".lock"
    with _locked(path) as file:
        with named_in_errors(path):
            file.truncate(0)
            file.write(f"{os.getpid()} {socket.gethostname()}")
            file.flush()
        yield Hold(path, file)


@contextmanager
def _locked(path: Path) -> Iterator[TextIO]:
    """Open and lock a file that is still the one at its path: a directory may be removed between the two."""
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a+", encoding="ascii", opener=own_file) as file:
            _lock(file, path)
            if is_at(path, file):
                yield file
                return


def _lock(file: TextIO, path: Path) -> None:
    try:
        with named_in_errors(path):  # some network file systems have no locks
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.seek(0)
        who = _holder(file.read())
        raise RunBusyError(f"{path.parent} is being trained by {who}; wait for it or stop it.") from error


def _holder(content: str) -> str:
    """Return who holds a lock, whose file is empty for the instant between the lock and the number of its process."""
    pid, _, host = content.strip().partition(" ")
    if not pid:
        return "another process"
    return f"process {pid}" if host in ("", socket.gethostname()) else f"process {pid} on {host}"


def is_at(path: Path, file: TextIO) -> bool:
    """Whether an open file is still the one at a path: it may have been removed or replaced.

    Args:
        path: Where it was.
        file: The file.
    """
    try:
        return os.path.samestat(path.lstat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False
