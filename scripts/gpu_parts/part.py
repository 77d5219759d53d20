"""One part of a report: commands with a time limit. No process of theirs is left behind, whatever they do."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

GRACE_S = 5.0
"""Seconds from SIGTERM to SIGKILL."""

MARK = "KFAC_SUA_GPU_REPORT_PART"
"""Environment variable by which processes that have left their group are found."""

OK, SKIPPED, RUNNING, INTERRUPTED = "ok", "skipped", "running", "interrupted"
_POLL_S = 0.05


class Interruption:
    """Whether Ctrl-C or SIGTERM has come.

    Attributes:
        number: Of the signal; 0 before.
    """

    def __init__(self) -> None:
        self.number = 0

    def heed(self, number: int, frame: object) -> None:
        """Note a signal: nothing is raised, so that what is being started or written is not torn."""
        del frame
        self.number = number


@contextlib.contextmanager
def heeding_signals() -> Iterator[Interruption]:
    """Note Ctrl-C and SIGTERM inside.

    A process that ignores one of them, such as one in the background of a script, goes on ignoring it.

    Yields:
        What has come.
    """
    interruption = Interruption()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    heeded = [number for number in before if before[number] is not signal.SIG_IGN]
    try:
        for number in heeded:
            signal.signal(number, interruption.heed)
        yield interruption
    finally:
        for number in heeded:
            signal.signal(number, before[number])


@dataclass(frozen=True)
class Part:
    """What is carried out in processes of its own.

    Args:
        name: Of the part, and of its log.
        commands: Shell commands, one after the other; one that fails does not keep the next from being tried.
        limit_s: Seconds that all of them may take together, of a report of ten minutes.
        shown_from: Of a part that is ok, the report shows the log from the last line that begins so; else its end.
        shown_lines: Of the end of the log, that the report shows.
        skipped: Why the part cannot be carried out here; empty if it can.
        note: What a reader of the report must know.
        summary: Makes a table for the report of what the commands left.
    """

    name: str
    commands: tuple[str, ...]
    limit_s: float
    shown_from: str = ""
    shown_lines: int = 20
    skipped: str = ""
    note: str = ""
    summary: Callable[[], str] | None = None


@dataclass(frozen=True)
class Outcome:
    """How a part ended.

    Args:
        text: ``ok``, or what happened in a few words.
        seconds: That it took.
    """

    text: str
    seconds: float

    @property
    def is_good(self) -> bool:
        """Whether nothing is wrong: done, or skipped for a reason."""
        return self.text == OK or self.text.startswith(SKIPPED)


def carry_out(part: Part, log: Path, limit_s: float, cwd: Path, interruption: Interruption) -> Outcome:
    """Carry out a part.

    Args:
        part: The part.
        log: Where all that it prints goes, unbuffered.
        limit_s: Seconds that it may take, with those from SIGTERM to SIGKILL.
        cwd: Working directory of its commands.
        interruption: What ends it early.

    Returns:
        How it ended; of all that it started nothing runs any more.
    """
    if part.skipped:
        return Outcome(f"{SKIPPED}: {part.skipped}", 0.0)
    started = time.monotonic()
    deadline = started + limit_s - min(GRACE_S, limit_s / 4)
    text = OK
    with log.open("wb") as file:
        for command in part.commands:
            file.write(f"$ {command}\n".encode())
            file.flush()
            code = _run(command, file.fileno(), deadline, cwd, interruption)
            if code is None:
                text = INTERRUPTED if interruption.number else f"timed out after {time.monotonic() - started:.0f} s"
                break
            if code != 0 and text == OK:
                text = _failure(code)
    return Outcome(text, time.monotonic() - started)


def _run(command: str, output: int, deadline: float, cwd: Path, interruption: Interruption) -> int | None:
    """Return the exit code of a shell command, or None if it was ended early."""
    mark = f"{MARK}={uuid.uuid4().hex}"
    name, _, value = mark.partition("=")
    process = subprocess.Popen(
        ["/bin/sh", "-c", command],
        cwd=cwd,
        env=os.environ | {"PYTHONUNBUFFERED": "1", name: value},
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # a process group, out of the terminal's reach
    )
    while process.poll() is None and not interruption.number and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    code = process.poll()
    _end(process, mark)
    return code


def _end(process: subprocess.Popen[bytes], mark: str) -> None:
    """End a process group and what has left it: torchrun gives each of its processes a session of its own."""
    _signal_group(process.pid, signal.SIGTERM)
    _signal(signal.SIGTERM, [number for number in _marked(mark) if _group_of(number) != process.pid])
    deadline = time.monotonic() + GRACE_S
    while (process.poll() is None or _marked(mark)) and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    _signal_group(process.pid, signal.SIGKILL)
    process.wait()
    while left := _marked(mark):  # one of them may just have started another
        _signal(signal.SIGKILL, left)
        time.sleep(_POLL_S)


def _signal_group(group: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)


def _signal(number: signal.Signals, processes: list[int]) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, number)


def _group_of(process: int) -> int:
    with contextlib.suppress(ProcessLookupError):
        return os.getpgid(process)
    return 0


def _marked(mark: str) -> list[int]:
    """Return the running processes that were started with this in their environment; Linux alone tells."""
    numbers = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # ended, or another user's
            if mark.encode() in (entry / "environ").read_bytes().split(b"\0"):
                numbers.append(int(entry.name))
    return numbers


def _failure(code: int) -> str:
    """Return an exit code in words."""
    if code >= 0:
        return f"failed with exit code {code}"
    return f"failed by {signal.Signals(-code).name}"
