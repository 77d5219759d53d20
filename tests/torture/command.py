"""The training command as a child of this process, which has paid for its imports already.

A child is forked before this process has computed anything, and goes through ``kfac_sua.train.main`` like
``python -m kfac_sua.train``; ``faults.py`` proves that both give the same numbers. It counts its steps and file
operations in memory that is shared with this process and therefore outlives a kill.
"""

import mmap
import os
import struct
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from signal import SIG_DFL, SIGINT, SIGKILL, SIGTERM, default_int_handler, signal

# What a run imports only when it comes to it; every child would pay for these anew.
import sklearn.datasets  # noqa: F401

from kfac_sua import train
from kfac_sua.training import files, loop
from kfac_sua.training.checkpoint import Checkpoint
from kfac_sua.training.evaluate import Evaluation
from kfac_sua.training.progress import Progress
from kfac_sua.training.state import Training

TIMEOUT_S = 600.0
_POLL_PERIOD_S = 0.002
# A process that os._exit ends cannot say more than this.
_BUG = 70


class Counter(IntEnum):
    """Numbers that a child shares with this process."""

    steps_done = 0
    steps_saved = 1
    file_operations = 2


@dataclass(frozen=True)
class Ended:
    """How a command ended.

    Attributes:
        code: Exit code; minus the number of the signal that killed it; None if it hung and was killed for that.
        out: What it printed.
        err: What it printed to stderr.
        seconds: How long it took.
        counts: Steps done, steps in the last checkpoint that it had time to write, and file operations.
    """

    code: int | None
    out: str
    err: str
    seconds: float
    counts: tuple[int, int, int]

    @property
    def complaint(self) -> str:
        """What is wrong with how it ended, whatever it was asked to do; empty if nothing is."""
        if self.code is None:
            return f"it hung for {TIMEOUT_S:.0f} s"
        if self.code == _BUG or "Traceback" in self.err:
            return f"it ended with a traceback: {_last_line(self.err)}"
        return ""

    @property
    def is_refusal(self) -> bool:
        """Whether it ended with one sentence and an exit code that says so."""
        return self.code in (1, 2) and self.err.count("\n") == 1 and not self.complaint

    def __str__(self) -> str:
        return f"exit code {self.code}, stderr {self.err.strip()[-400:]!r}"


class Running:
    """A command in progress.

    Args:
        pid: Its process.
        output: Files that hold what it prints, and what it prints to stderr.
        counters: Memory shared with it.
    """

    def __init__(self, pid: int, output: tuple[Path, Path], counters: mmap.mmap) -> None:
        self.pid = pid
        self._output = output
        self._counters = counters
        self._started_at = time.monotonic()
        self._status: int | None = None

    @property
    def is_running(self) -> bool:
        """Whether it has not ended."""
        if self._status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._status = os.waitstatus_to_exitcode(status) if pid else None
        return self._status is None

    def wait_for_first_file(self) -> None:
        """Wait until it has written to its run's directory, or ended."""
        while self.is_running and not struct.unpack_from("3q", self._counters)[Counter.file_operations]:
            time.sleep(_POLL_PERIOD_S)

    def send(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.is_running:
            os.kill(self.pid, number)

    def sleep(self, seconds: float) -> None:
        """Wait for so long, or until it ends."""
        end = time.monotonic() + seconds
        while self.is_running and time.monotonic() < end:
            time.sleep(min(_POLL_PERIOD_S, max(0.0, end - time.monotonic())))

    def wait(self) -> Ended:
        """Wait until it ends; one that hangs is killed."""
        self.sleep(TIMEOUT_S)
        code = self._status
        if self.is_running:
            self.send(SIGKILL)
            os.waitpid(self.pid, 0)
        seconds = time.monotonic() - self._started_at
        out, err = (path.read_text(encoding="utf-8", errors="replace") for path in self._output)
        return Ended(code, out, err, seconds, struct.unpack_from("3q", self._counters))


def nothing() -> None:
    """Change nothing about a command."""


def start(arguments: Sequence[str], log_dir: Path, prepare: Callable[[], None] = nothing) -> Running:
    """Start ``python -m kfac_sua.train`` with these arguments.

    Args:
        arguments: The command line.
        log_dir: Directory in which it runs and which gets what it prints; made if missing.
        prepare: Called in the child, to bring a fault about.
    """
    log_dir.mkdir(parents=True, exist_ok=True)
    number = len(list(log_dir.glob("*.out")))
    output = (log_dir / f"{number}.out", log_dir / f"{number}.err")
    for path in output:
        path.touch()
    counters = mmap.mmap(-1, struct.calcsize("3q"))
    pid = os.fork()
    if pid == 0:
        _be_the_command(arguments, output, counters, prepare)
    return Running(pid, output, counters)


def call(arguments: Sequence[str], log_dir: Path, prepare: Callable[[], None] = nothing) -> Ended:
    """Run ``python -m kfac_sua.train`` to its end; see :func:`start`."""
    return start(arguments, log_dir, prepare).wait()


def after_each_step(action: Callable[[Training], None]) -> None:
    """Have this process do something after every optimisation step."""
    original = loop.train_epoch

    def train_epoch(training: Training, progress: Progress, after_batch: Callable[[], None]) -> Evaluation:
        def after_step() -> None:
            action(training)
            after_batch()

        return original(training, progress, after_step)

    loop.train_epoch = train_epoch


def after_each_save(action: Callable[[int], None]) -> None:
    """Have this process do something after every checkpoint, of which it is told the step."""
    original = files.save_checkpoint

    def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
        original(path, checkpoint)
        action(checkpoint.step)

    files.save_checkpoint = save_checkpoint


def before_file_operation(action: Callable[[], None]) -> None:
    """Have this process do something before it opens a file for writing, renames or removes one."""

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        is_write = event == "open" and isinstance(arguments[1], str) and not arguments[1].startswith("r")
        if is_write or event in ("os.rename", "os.remove", "os.truncate"):
            action()

    sys.addaudithook(hook)


def _be_the_command(
    arguments: Sequence[str], output: tuple[Path, Path], counters: mmap.mmap, prepare: Callable[[], None]
) -> None:
    """Carry out the command line and leave, whatever happens: no frame of the parent may go on in the child."""
    code = _BUG
    try:
        _take_over(output)
        _count(counters)
        prepare()
        sys.argv = ["kfac_sua.train", *arguments]
        code = train.main()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:  # what would reach the user as a traceback
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _take_over(output: tuple[Path, Path]) -> None:
    """Give a forked child the streams, signals and directory of a new process."""
    signal(SIGINT, default_int_handler)
    signal(SIGTERM, SIG_DFL)
    os.environ.pop("HYDRA_FULL_ERROR", None)
    os.chdir(output[0].parent)
    for descriptor, path in enumerate(output, start=1):
        file = os.open(path, os.O_WRONLY)
        os.dup2(file, descriptor)
        os.close(file)
    sys.stdout, sys.stderr = (open(d, "w", encoding="utf-8", closefd=False, buffering=1) for d in (1, 2))  # noqa: SIM115


def _count(counters: mmap.mmap) -> None:
    values = [0, 0, 0]

    def set_to(counter: Counter, value: int) -> None:
        values[counter] = value
        struct.pack_into("3q", counters, 0, *values)

    after_each_step(lambda training: set_to(Counter.steps_done, training.step))
    after_each_save(lambda step: set_to(Counter.steps_saved, step))
    before_file_operation(lambda: set_to(Counter.file_operations, values[Counter.file_operations] + 1))


def _last_line(text: str) -> str:
    return text.strip().rpartition("\n")[2][:300]
