"""One process per run directory: a second one raises an error instead of mixing in its records."""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from kfac_sua.files.atomic import named_in_errors
from kfac_sua.files.openers import own_file


class RunBusyError(Exception):
    """Another process is carrying out the run; the message is one sentence."""


class RunLostError(RunBusyError):
    """The run's directory is no longer the one that was locked."""


@dataclass(frozen=True)
class Hold:
    """A lock that this process holds.

    Args:
        path: The lock's file.
        file: The open file.
    """

    path: Path
    file: TextIO

    def check(self) -> None:
        """Raise :class:`RunLostError` if the directory was removed or replaced: it may be another process's now."""
        if not is_at(self.path, self.file):
            raise RunLostError(f"{self.path.parent} was removed or replaced; this process writes nothing more.")


@contextmanager
def exclusive(directory: Path) -> Iterator[Hold]:
    """Lock a run directory; the system releases the lock when the process ends, in whatever way.

    Args:
        directory: The run directory, made if missing.

    Yields:
        The lock, to be checked before each write.

    Raises:
        RunBusyError: If another process holds it.
        OSError: If the lock's file cannot be made or written, or is a link.
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
    """Open and lock the file; start again if its directory was removed between the two."""
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
    """Return who holds a lock. The file is empty for an instant, until its process has written its number."""
    pid, _, host = content.strip().partition(" ")
    if not pid:
        return "another process"
    return f"process {pid}" if host in ("", socket.gethostname()) else f"process {pid} on {host}"


def is_at(path: Path, file: TextIO) -> bool:
    """Whether an open file is still the file at a path, and was not removed or replaced.

    Args:
        path: The path it was opened at.
        file: The file.
    """
    try:
        return os.path.samestat(path.lstat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False
