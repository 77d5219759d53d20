"""Ctrl-C while a command is still importing its packages, which takes seconds.

Imports nothing heavy itself, so that it can come first.
"""

import os
import signal
from types import FrameType


def leave_on_interrupt() -> None:
    """Make Ctrl-C end the process with one line and code 130, until :func:`raise_on_interrupt`.

    A process that ignores Ctrl-C, such as one in the background of a script, goes on ignoring it.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)


def raise_on_interrupt() -> None:
    """Make Ctrl-C raise ``KeyboardInterrupt`` again, for code that can deal with it."""
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _leave(number: int, frame: FrameType | None) -> None:
    """Leave at once: an exception within the import of an extension module may end anywhere."""
    del frame
    os.write(2, b"interrupted.\n")
    os._exit(128 + number)
