"""How every command begins and ends: its streams, and Ctrl-C during the seconds in which it imports its packages.

This file imports nothing heavy, so that it can come first.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import NoReturn

from kfac_sua.streams import guard_streams, leave_with


def begin() -> None:
    """Make Ctrl-C end the process with one line and code 130, until :func:`run_command`, and let no output fail.

    A process that ignores Ctrl-C, such as one in the background of a script, goes on ignoring it. A package that cannot
    be imported ends the process with one sentence and code 2.
    """
    guard_streams()
    sys.excepthook = _explain_missing_package
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)


def run_command(command: Callable[[], int | None]) -> NoReturn:
    """Carry out a command, in which Ctrl-C raises ``KeyboardInterrupt`` again, and leave with its exit code.

    Args:
        command: The command's ``main``.

    Raises:
        SystemExit: Always. The code is 1 instead of 0 if output was lost, as on a full disk, and no file holds it.
    """
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.excepthook = sys.__excepthook__
    leave_with(command)


def _leave(number: int, frame: FrameType | None) -> None:
    """Leave at once: an exception within the import of an extension module may end anywhere."""
    del frame
    with contextlib.suppress(OSError):  # nobody may read stderr
        os.write(2, b"interrupted.\n")
    os._exit(128 + number)


def _explain_missing_package(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """Leave with one sentence if a package of others is not installed; print any other error as Python does."""
    package = error.name.partition(".")[0] if isinstance(error, ModuleNotFoundError) and error.name else ""
    if package in ("", "kfac_sua"):
        sys.__excepthook__(kind, error, traceback)
        return
    print(
        f"This command needs the package {package!r}, which is not installed: python -m pip install kfac_sua installs "
        f"it and all others that the commands need (pip's --no-deps leaves them out, as the library needs PyTorch "
        f"alone).",
        file=sys.stderr,
        flush=True,
    )
    os._exit(2)  # an excepthook cannot set the exit code in another way
