"""SIGINT, SIGTERM and pre-emption as requests: the process finishes and saves the current step before it ends."""

import contextlib
import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Environment variable with the name of the signal that submitit has Slurm send before a job is pre-empted.
_PREEMPTION_VARIABLE = "SUBMITIT_PREEMPT_SIGNAL"


class Interrupted(KeyboardInterrupt):
    """A signal has stopped a run; the message says where the same command resumes.

    Args:
        message: One sentence.
        signal_number: The signal.
    """

    def __init__(self, message: str, signal_number: int = signal.SIGINT) -> None:
        super().__init__(message)
        self.signal_number = signal_number


class StopRequest:
    """A context that remembers the first signal to stop; a later SIGINT raises KeyboardInterrupt at once.

    A later SIGTERM does not raise: a scheduler may send one to the process and another to its group. A signal that is
    ignored stays ignored: the workers of a campaign leave Ctrl-C to their parent. Outside the main thread, where Python
    handles no signals, the context does nothing.

    In a job of submitit, which installs a handler for pre-emption, the signal of pre-emption stops the run too. It is
    raised again after the run is saved and submitit's handler is back, which requeues the job. There SIGTERM only asks
    for a checkpoint, as either the pre-emption or SIGKILL follows. A later SIGINT does not raise there: the job's
    supervisor repeats the SIGINT that the terminal has already sent.

    Args:
        is_main_process: Whether this process prints for all that carry out the run.
        is_single_process: Whether the run has one process.

    Attributes:
        signal_number: The first signal that asks the run to stop; ``None`` so far.
        is_to_save: Whether a checkpoint is requested; whoever writes it resets this.
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
            name = os.environ.get(_PREEMPTION_VARIABLE, "USR2")
            preemption = getattr(signal, f"SIG{name}", signal.SIGUSR2)
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
        if is_preempted and isinstance(error, Interrupted):  # a failed run would fail again if requeued
            print(error, flush=True)  # the handler raises another exception
            signal.raise_signal(error.signal_number)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        del frame
        if number == signal.SIGTERM and self._preemption is not None:
            self.is_to_save = True
            _write_line(b"saving after this step.\n")
        elif self.signal_number is None:
            self.signal_number = number
            self._announce_stop()
        elif number == signal.SIGINT and self._preemption is None:
            raise KeyboardInterrupt

    def _announce_stop(self) -> None:
        if self._is_single_process:
            _write_line(b"stopping after this step; Ctrl-C stops at once.\n")
        elif self._is_main_process:  # torchrun does not forward a second Ctrl-C
            _write_line(b"stopping after this step.\n")


def _write_line(line: bytes) -> None:
    """Write a line to stderr from a handler, where ``print`` is not re-entrant; the terminal may be gone."""
    with contextlib.suppress(OSError):
        os.write(2, line)
