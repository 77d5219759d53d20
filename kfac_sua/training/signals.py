"""Ctrl-C and SIGTERM as requests: the current step is finished and saved before the process ends."""

import contextlib
import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """A run stopped by a signal; the message says where the same command goes on.

    Args:
        message: One sentence.
        signal_number: The signal.
    """

    def __init__(self, message: str, signal_number: int = signal.SIGINT) -> None:
        super().__init__(message)
        self.signal_number = signal_number


class StopRequest:
    """While entered, remembers the first SIGINT or SIGTERM; a SIGINT after it raises where it arrives.

    A further SIGTERM is no impatient user: a scheduler may send one to the process and another to its group. A signal
    that is ignored stays ignored: the workers of a campaign leave Ctrl-C to their parent. Outside the main thread,
    which alone receives signals, entering does nothing.
    """

    def __init__(self) -> None:
        self.signal_number: int | None = None
        self._replaced: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._replaced[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        while self._replaced:
            number, handler = self._replaced.popitem()
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self.signal_number is None:
            self.signal_number = number
            with contextlib.suppress(OSError):  # of a terminal or a pipe that is gone; print() is not re-entrant
                os.write(2, b"stopping after this step; Ctrl-C stops at once.\n")
        elif number == signal.SIGINT:
            raise KeyboardInterrupt
