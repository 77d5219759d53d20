"""One process per run directory: a second one leaves with a sentence instead of mixing its records in."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class RunBusyError(Exception):
    """A run that another process is carrying out; the message is one sentence."""


@contextmanager
def exclusive(directory: Path) -> Iterator[None]:
    """Hold a run directory for this process; the lock goes with the process, however it ends.

    Args:
        directory: The run directory, made if missing.

    Raises:
        RunBusyError: If another process holds it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / ".lock").open("a+", encoding="ascii") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise RunBusyError(f"{directory} is being trained by process {holder}; wait for it or stop it.") from error
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
