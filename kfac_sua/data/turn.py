"""One process at a time: the others wait for their turn."""

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from kfac_sua.files.atomic import named_in_errors
from kfac_sua.files.lock import is_at
from kfac_sua.files.openers import own_file


@contextmanager
def turn(path: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    """Hold a lock, after waiting for its holder. The system releases it when the process ends, however that happens.

    Args:
        path: The lock's file. Its directory is made if missing; the file is removed at the end, and so are the
            directories that were made if they are still empty.
        on_wait: Called before the first wait.

    Raises:
        OSError: If it cannot be made or locked, or its file is a link.
    """
    made = [directory for directory in path.parents if not directory.exists()]  # the innermost first
    has_waited = False
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = own_file(str(path), os.O_RDWR | os.O_CREAT)
        except FileNotFoundError:  # whoever had the turn removed the directory between the two lines above
            continue
        with os.fdopen(descriptor) as file:
            with named_in_errors(path):  # some network file systems have no locks
                if not _locked_at_once(file):
                    if not has_waited:
                        on_wait()
                    has_waited = True
                    fcntl.flock(file, fcntl.LOCK_EX)
            if not is_at(path, file):  # whoever had the turn has removed it
                continue
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
                for directory in made:
                    with suppress(OSError):
                        directory.rmdir()
            return


def _locked_at_once(file: TextIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
