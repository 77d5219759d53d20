"""Ctrl-C, SIGTERM and pre-emption as requests: the current step is finished and saved before the process ends."""

import contextlib
import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
# In which submitit finds the name of the signal that it sends, and has sent, before a job is taken off its machine.
_PREEMPTION_VARIABLE = "SUBMITIT_PREEMPT_SIGNAL"


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
    """While entered, remembers the first signal to stop; a SIGINT after it raises where it arrives.

    A further SIGTERM is no impatient user: a scheduler may send one to the process and another to its group. A signal
    that is ignored stays ignored: the workers of a campaign leave Ctrl-C to their parent. Outside the main thread,
    which alone receives signals, entering does nothing.

    Where someone has installed a handler for pre-emption, as submitit does in its jobs, that signal stops the run too,
    and is sent again once the run is saved and the old handler is back: it puts the job into the queue again. There
    SIGTERM asks for a checkpoint alone: either the pre-emption comes next, or SIGKILL. And Ctrl-C raises nowhere: the
    process that watches over a job repeats what its terminal has sent already.

    Args:
        is_main_process: Whether this process speaks for all that carry out the run.
        is_single_process: Whether there is but one.

    Attributes:
        signal_number: The first signal that asks the run to stop.
        is_to_save: Whether a checkpoint has been asked for; whoever writes it takes that back.
    """

    def __init__(self, *, is_main_process: bool = True, is_single_process: bool = True) -> None:
        self.signal_number: int | None = None
        self.is_to_save = False
        self._is_main_process = is_main_process
        self._is_single_process = is_single_process
        self._preemption: int | None = None
        self._replaced: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            preemption = _preemption_signal()
            if callable(signal.getsignal(preemption)):
                self._preemption = preemption
            for number in (*STOP_SIGNALS, *([preemption] if self._preemption else [])):
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._replaced[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        while self._replaced:
            number, handler = self._replaced.popitem()
            signal.signal(number, handler)
        is_preempted = self._preemption is not None and self.signal_number == self._preemption
        if is_preempted and isinstance(error, Interrupted):  # one that failed would fail again
            print(error, flush=True)  # the handler leaves with an exception of its own
            signal.raise_signal(error.signal_number)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        del frame
        if number == signal.SIGTERM and self._preemption is not None:
            self.is_to_save = True
            _say(b"saving after this step.\n")
        elif self.signal_number is None:
            self.signal_number = number
            self._say_that_it_stops()
        elif number == signal.SIGINT and self._preemption is None:
            raise KeyboardInterrupt

    def _say_that_it_stops(self) -> None:
        if self._is_single_process:
            _say(b"stopping after this step; Ctrl-C stops at once.\n")
        elif self._is_main_process:  # torchrun lets no second Ctrl-C through
            _say(b"stopping after this step.\n")


def _preemption_signal() -> int:
    name = os.environ.get(_PREEMPTION_VARIABLE, "USR2")
    return getattr(signal, f"SIG{name}", signal.SIGUSR2)


def _say(line: bytes) -> None:
    """Write a line to stderr from a handler, where ``print`` would be re-entrant; a terminal may be gone."""
    with contextlib.suppress(OSError):
        os.write(2, line)
