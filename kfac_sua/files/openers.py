"""Openers, for ``open(path, mode, opener=…)``, that refuse a named pipe, a link or the like in the place of a file.

All errors are ``OSError`` with the file's name and a reason in words.
"""

import errno
import os
import stat
from pathlib import Path

_KINDS = (
    *((stat.S_ISFIFO, "a named pipe"), (stat.S_ISSOCK, "a socket")),
    *((stat.S_ISCHR, "a device"), (stat.S_ISBLK, "a device"), (stat.S_ISDIR, "a directory")),
)


def regular_file(path: str, flags: int) -> int:
    """Open a regular file, or a link to one; refuse anything else without waiting for it, as for a named pipe.

    Args:
        path: The file.
        flags: As for ``os.open``.

    Returns:
        A descriptor.

    Raises:
        OSError: If it cannot be opened, or is something else.
    """
    try:
        descriptor = os.open(path, flags | os.O_NONBLOCK, 0o666)  # O_NONBLOCK does not affect regular files
    except OSError as error:
        if error.errno == errno.ENXIO:  # a socket, or a pipe that nobody reads
            refuse_special(path)
        raise
    try:
        _refuse_kind(path, os.fstat(descriptor))
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def own_file(path: str, flags: int) -> int:
    """Open a file to write it in place; refuse a link, through which another file would be overwritten.

    Args:
        path: The file; its directory may be a link.
        flags: As for ``os.open``.

    Returns:
        A descriptor.

    Raises:
        OSError: If it cannot be opened, is a link, or is no regular file.
    """
    try:
        return regular_file(path, flags | os.O_NOFOLLOW)
    except OSError:
        refuse_link(path)
        raise


def refuse_link(path: Path | str) -> None:
    """Refuse a link, through which another file would be written.

    Args:
        path: The path that is about to be written; it need not exist.

    Raises:
        OSError: If it is a link, even a dangling one.
    """
    if os.path.islink(path):  # noqa: PTH114 - path may be a str
        raise OSError(errno.ELOOP, "it is a symbolic link, which is not followed; remove it", str(path))


def read_regular(path: Path) -> bytes:
    """Return the content of a regular file.

    Args:
        path: The file, or a link to it.

    Raises:
        OSError: If it cannot be read, or is something else.
    """
    with open(path, "rb", opener=regular_file) as file:
        return file.read()


def refuse_special(path: Path | str) -> None:
    """Refuse a path that exists but is no regular file, before a library opens it by its name.

    Args:
        path: The file, or a link to it; it need not exist.

    Raises:
        OSError: If it is something else.
    """
    try:
        found = os.stat(path)  # noqa: PTH116 - path may be a str
    except FileNotFoundError:
        return
    _refuse_kind(path, found)


def cannot_use(error: OSError, path: Path | str = "a file") -> str:
    """Return the one sentence in which every command says that a file cannot be used.

    Args:
        error: What the system, or this module, says of it.
        path: What to name where the error names no file.
    """
    return f"Cannot use {error.filename or path}: {error.strerror or ' '.join(str(error).split()) or 'no details'}."


def _refuse_kind(path: Path | str, found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        kind = next((text for is_kind, text in _KINDS if is_kind(found.st_mode)), "something else")
        number = errno.EISDIR if stat.S_ISDIR(found.st_mode) else errno.EINVAL
        raise OSError(number, f"it is {kind}, not a regular file", str(path))
