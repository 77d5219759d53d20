"""How files are opened that someone may have put something else in the place of: a named pipe, a link.

For ``open(path, mode, opener=…)``. All errors are ``OSError`` with the file's name and a reason in words.
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
    """Open what must be a regular file, or a link to one: anything else is refused, and not waited for.

    Args:
        path: The file.
        flags: As for ``os.open``.

    Returns:
        A descriptor.

    Raises:
        OSError: If it cannot be opened, or is something else.
    """
    try:
        descriptor = os.open(path, flags | os.O_NONBLOCK, 0o666)  # of a regular file it changes nothing
    except OSError as error:
        if error.errno == errno.ENXIO:  # a socket, or a pipe to write to
            refuse_special(path)
        raise
    try:
        _refuse_kind(path, os.fstat(descriptor))
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def own_file(path: str, flags: int) -> int:
    """Open a file that is written in place: through a link, something else would be overwritten.

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
    """Refuse a link, through which one would write somewhere else.

    Args:
        path: What is about to be written to; nothing may be there.

    Raises:
        OSError: If it is a link, wherever that leads.
    """
    if os.path.islink(path):  # noqa: PTH114 - also of a text
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
    """Refuse what is there but is no regular file, before a library opens it by its name.

    Args:
        path: The file, or a link to it; nothing may be there.

    Raises:
        OSError: If it is something else.
    """
    try:
        found = os.stat(path)  # noqa: PTH116 - also of a text
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
