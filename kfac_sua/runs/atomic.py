"""Files that are there whole or not at all, and errors that say which file they are about."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a crash or a full disk at any moment leaves either the old content or the new one.

    Args:
        path: The file, whose directory exists.
        content: All that it shall hold.

    Raises:
        OSError: If it cannot be written; it names the file, which is then as before.
    """
    with written_beside(path, content) as temporary:
        temporary.replace(path)


@contextlib.contextmanager
def written_beside(path: Path, *parts: bytes | memoryview) -> Iterator[Path]:
    """Write a temporary file beside another, as only a rename within a file system is atomic.

    It is always a new file: what a killed process, or anybody else, has left under its name is removed, and a link
    there is not followed. The rename does not follow one either.

    Args:
        path: The file that the temporary one is to replace.
        parts: What the temporary one shall hold.

    Yields:
        The temporary file, which is on the disk; if anything fails, it is removed.

    Raises:
        OSError: If it cannot be written; it names ``path``.
    """
    temporary = path.with_name(path.name + ".tmp")
    with named_in_errors(path):
        try:
            temporary.unlink(missing_ok=True)
            try:
                descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            except OSError as error:
                error.filename = str(path)  # as in a directory that is missing
                raise
            with os.fdopen(descriptor, "wb") as file:
                for part in parts:
                    file.write(part)
                file.flush()
                os.fsync(file.fileno())
            yield temporary
        except BaseException:
            with contextlib.suppress(OSError):  # of a removed directory, where the first error says more
                temporary.unlink()
            raise


@contextlib.contextmanager
def named_in_errors(path: Path) -> Iterator[None]:
    """Name a file in the errors of what is done with it: of a full disk, Python says the reason but not the file.

    Args:
        path: The file.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise
