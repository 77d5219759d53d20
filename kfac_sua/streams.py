"""The standard streams of a command, made so that nothing that happens to them stops its work.

A character that a stream cannot encode is replaced, a reader that has gone is not missed, and what a full device
refuses is said once, on stderr. Imports nothing heavy itself, so that it can come first.
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
# How to read what the commands print where a stream is ASCII or Latin-1. The width of a character is kept where one
# of ASCII looks like it.
_READABLE = {
    **{"±": "+-", "×": "x", "·": "*", "√": "sqrt", "²": "^2", "³": "^3", "ε": "eps", "µ": "u", "′": "'"},
    **{"≥": ">=", "≤": "<=", "≠": "!=", "→": "->", "–": "-", "−": "-", "…": "...", "•": "*"},
    **{"“": '"', "”": '"', "\N{RIGHT SINGLE QUOTATION MARK}": "'", "\N{NO-BREAK SPACE}": " "},
}


def guard_streams() -> None:
    """Let no output fail, of stdout and stderr and of all that is printed to them: call it before anything is.

    - A descriptor that was closed before the start (``>&-``) is /dev/null, or the next file to be opened would get its
      number, and with it all that libraries print.
    - What a stream cannot encode is replaced, by what reads alike or else by its code.
    - What cannot be written is dropped. Of stdout that is said once on stderr, unless its reader has gone.

    A stream that someone else has put in the place of the process's own is left alone.
    """
    _occupy_descriptors()
    codecs.register_error(_ERRORS, _replacement)
    if sys.stdout is sys.__stdout__ or sys.stdout is None:
        sys.stdout = _guarded(sys.stdout, _STDOUT)
    if sys.stderr is sys.__stderr__ or sys.stderr is None:
        sys.stderr = _guarded(sys.stderr, _STDERR)


def output_is_recorded() -> None:
    """Say that files hold what this command comes to, so that output that is lost makes no failure of it."""
    _writer(_STDOUT).is_recorded = True


def leave_with(command: Callable[[], int | None]) -> NoReturn:
    """Carry out a command and leave with its exit code.

    Args:
        command: Returns its exit code, or None for 0; or raises ``SystemExit``.

    Raises:
        SystemExit: Always; with code 1 instead of 0 if output was lost that nothing else holds, 130 after Ctrl-C.
    """
    try:
        code: object = command()
    except SystemExit as leaving:
        code = leaving.code
    except KeyboardInterrupt:  # of a command that has nothing to say of its own
        print("interrupted.", file=sys.stderr, flush=True)
        code = _INTERRUPTED
    sys.stdout.flush()
    output = _writer(_STDOUT)
    raise SystemExit(_LOST if not code and output.is_lost and not output.is_recorded else code)


class _Writer(io.FileIO):
    """Writes to a descriptor what can be written there.

    Attributes:
        is_lost: Whether something could not be, and not because its reader has gone.
        is_recorded: Whether that is of no consequence.
    """

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self.is_lost = self.is_recorded = False

    def write(self, data: Any, /) -> int:
        """Write all of it, and return how much that was; what is refused counts as written."""
        content = memoryview(data).cast("B")
        left = content
        while left:
            try:
                written = super().write(left)
            except OSError as error:
                self._lose(error)
                break
            if written is None:  # the descriptor does not block, as some terminals leave it
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
    """Return what writes to a descriptor as a stream does, but never fails."""
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
    if "\udc80" <= character <= "\udcff":  # a byte of a file's name that is no text in this encoding
        return bytes([ord(character) - 0xDC00]), end
    return _READABLE.get(character) or character.encode("ascii", "backslashreplace").decode("ascii"), end
