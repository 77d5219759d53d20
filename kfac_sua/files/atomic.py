"""Atomic writes, and errors that name their file."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from kfac_sua.files.openers import refuse_special


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a crash or a full disk at any moment leaves either the old or the new content.

    Args:
        path: The file, whose directory exists.
        content: Its whole content.

    Raises:
        OSError: If it cannot be written; it names the file, which is then as before.
    """
    with written_beside(path, content) as temporary:
        temporary.replace(path)


@contextlib.contextmanager
def written_beside(path: Path, *parts: bytes | memoryview) -> Iterator[Path]:
    """Write a temporary file beside another, as only a rename within one file system is atomic.

    The temporary file is always new: a file or a link under its name, as a killed process may leave it, is removed. The
    rename does not follow links either.

    Args:
        path: The file that the temporary one is to replace.
        parts: Content of the temporary file, in parts.

    Yields:
        The temporary file, synchronised to disk; if anything fails, it is removed.

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
                error.filename = str(path)  # for instance, its directory is missing
                raise
            with os.fdopen(descriptor, "wb") as file:
                for part in parts:
                    file.write(part)
                file.flush()
                os.fsync(file.fileno())
            yield temporary
        except BaseException:
            with contextlib.suppress(OSError):  # the directory may be gone; the first error says more
                temporary.unlink()
            raise


@contextlib.contextmanager
def named_in_errors(path: Path) -> Iterator[None]:
    """Add a file's name to errors raised inside: when a disk is full, Python names the reason but not the file.

    Args:
        path: The file.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


def refuse_unwritable(path: Path) -> None:
    """Raise if a file cannot be written, before the minutes of measuring for it.

    Args:
        path: The file. It is not changed.

    Raises:
        OSError: If it cannot be written, or is no regular file, since a new file would replace it.
    """
    refuse_special(path)
    with written_beside(path) as temporary:
        temporary.unlink()
