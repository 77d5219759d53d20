"""The standard streams of a command, guarded so that no fault of theirs stops its work.

A character that a stream cannot encode is replaced. A reader that has gone is no error. What a full device refuses is
reported once, on stderr. This file imports nothing heavy, so that it can come first.
"""

import codecs
import errno
import functools
import io
import os
import select
import sys
from collections.abc import Callable
from typing import Any, NoReturn, TextIO

_STDOUT, _STDERR = 1, 2
_LOST, _INTERRUPTED = 1, 130  # exit codes

_ERRORS = "kfac_sua.readable"
# What to print where a stream is ASCII or Latin-1: characters that read alike, of the same width where there is one.
_READABLE = {
    **{"±": "+-", "×": "x", "·": "*", "√": "sqrt", "²": "^2", "³": "^3", "ε": "eps", "µ": "u", "′": "'"},
    **{"≥": ">=", "≤": "<=", "≠": "!=", "→": "->", "–": "-", "−": "-", "…": "...", "•": "*"},
    **{"“": '"', "”": '"', "\N{RIGHT SINGLE QUOTATION MARK}": "'", "\N{NO-BREAK SPACE}": " "},
}


def guard_streams() -> None:
    """Keep all output to stdout and stderr from failing. Call this before anything is printed.

    - A descriptor that was closed before the start (``>&-``) becomes /dev/null. Otherwise the next file to be opened
      would get its number, and with it all that libraries print.
    - A character that a stream cannot encode is replaced by one that reads alike, or else by its code.
    - What cannot be written is dropped. For stdout, stderr says so once, unless the reader of stdout has gone.

    A stream that someone else has put in the place of the process's own is not changed.
    """
    _occupy_descriptors()
    codecs.register_error(_ERRORS, _replacement)
    if sys.stdout is sys.__stdout__ or sys.stdout is None:
        sys.stdout = _guarded(sys.stdout, _STDOUT)
    if sys.stderr is sys.__stderr__ or sys.stderr is None:
        sys.stderr = _guarded(sys.stderr, _STDERR)


def output_is_recorded() -> None:
    """Note that files hold the results of this command, so that lost output does not make it fail."""
    _writer(_STDOUT).is_recorded = True


def leave_with(command: Callable[[], int | None]) -> NoReturn:
    """Carry out a command and leave with its exit code.

    Args:
        command: Returns its exit code, or None for 0; or raises ``SystemExit``.

    Raises:
        SystemExit: Always. The code is 1 instead of 0 if output was lost that no file holds, and 130 after Ctrl-C.
    """
    try:
        code: object = command()
    except SystemExit as leaving:
        code = leaving.code
    except KeyboardInterrupt:  # the command has no sentence of its own for it
        print("interrupted.", file=sys.stderr, flush=True)
        code = _INTERRUPTED
    sys.stdout.flush()
    output = _writer(_STDOUT)
    raise SystemExit(_LOST if not code and output.is_lost and not output.is_recorded else code)


class _Writer(io.FileIO):
    """Writes to a descriptor, and drops what cannot be written.

    Attributes:
        is_lost: Whether something was dropped for another reason than that its reader has gone.
        is_recorded: Whether files hold what was dropped.
    """

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self.is_lost = self.is_recorded = False

    def write(self, data: Any, /) -> int:
        """Write data and return its length; what the system refuses counts as written."""
        content = memoryview(data).cast("B")
        left = content
        while left:
            try:
                written = super().write(left)
            except OSError as error:
                self._lose(error)
                break
            if written is None:  # the descriptor does not block, as after some terminals
                select.select([], [self], [])
            else:
                left = left[written:]
        return len(content)

    def _lose(self, error: OSError) -> None:
        is_first, is_missed = not self.is_lost, error.errno != errno.EPIPE
        self.is_lost = self.is_lost or is_missed
        if is_first and is_missed and self.fileno() == _STDOUT:
            print(f"Cannot write to standard output: {error.strerror}.", file=sys.stderr, flush=True)


@functools.cache
def _writer(descriptor: int) -> _Writer:
    """Return the one writer of a descriptor."""
    return _Writer(descriptor)


def _guarded(stream: TextIO | None, descriptor: int) -> TextIO:
    """Return a stream that writes to a descriptor like another one, but never fails."""
    raw = _writer(descriptor)
    is_unbuffered = isinstance(stream, io.TextIOWrapper) and stream.write_through
    return io.TextIOWrapper(
        raw if is_unbuffered else io.BufferedWriter(raw),
        encoding=stream.encoding if stream is not None else "utf-8",
        errors=_ERRORS,
        line_buffering=descriptor == _STDERR or os.isatty(descriptor),
        write_through=is_unbuffered,
    )


def _occupy_descriptors() -> None:
    """Open /dev/null in the place of each standard descriptor that is closed."""
    for descriptor in (0, _STDOUT, _STDERR):
        try:
            os.fstat(descriptor)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is this one
            os.set_inheritable(opened, True)


def _replacement(error: UnicodeError) -> tuple[str | bytes, int]:
    """Return what to print instead of one character, and where to go on."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    character, end = error.object[error.start], error.start + 1
    if "\udc80" <= character <= "\udcff":  # Python's stand-in for a byte of a file name that is no valid text
        return bytes([ord(character) - 0xDC00]), end
    return _READABLE.get(character) or character.encode("ascii", "backslashreplace").decode("ascii"), end
