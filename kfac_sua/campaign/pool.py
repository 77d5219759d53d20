"""Processes that carry out runs, several at a time, and go with the process that started them."""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING

from kfac_sua.config import Config
from kfac_sua.runs.atomic import named_in_errors
from kfac_sua.runs.lock import RunBusyError, RunLostError
from kfac_sua.runs.record import failure_reason

if TYPE_CHECKING:
    from kfac_sua.campaign.cell import Cell

POLL_PERIOD_S = 1.0
# How long a worker that is told to stop may take for its current step and its checkpoint.
LEAVING_TIME_S = 30.0
# How long a run may still be held by a worker whose parent was killed, which leaves in the same way.
BUSY_TIME_S = LEAVING_TIME_S + 5.0
BUSY_PERIOD_S = 0.5


@dataclass(frozen=True)
class Task:
    """What a worker is told: a run, where its output goes, and how many threads it has if its configuration is silent.

    Attributes:
        config: The run.
        log: File that what the run prints is appended to.
        num_threads: CPU threads of PyTorch where ``config.num_threads`` is null; None leaves PyTorch's choice.
    """

    config: Config
    log: Path
    num_threads: int | None


@dataclass
class _Worker:
    process: BaseProcess
    connection: Connection
    cell: "Cell | None" = None


def run_all(
    cells: "Sequence[Cell]",
    make_task: "Callable[[Cell], Task]",
    *,
    jobs: int,
    reuse: bool,
    on_end: "Callable[[Cell, str | None], None]",
    on_tick: "Callable[[list[Cell]], None]",
) -> None:
    """Carry out runs in worker processes.

    Args:
        cells: The runs, in the order in which they are started.
        make_task: What a worker needs to know of one.
        jobs: Runs at the same time.
        reuse: Whether a worker takes one run after the other, which saves the imports; otherwise each run has a
            process of its own, so that none finds warm caches that another lacks.
        on_end: Called with each run that has ended and, if it failed, the reason in one sentence.
        on_tick: Called about once a second with the runs in progress.

    Raises:
        KeyboardInterrupt: On Ctrl-C, after the workers have been stopped.
    """
    waiting = list(cells)
    with _workers() as workers:
        while waiting or any(worker.cell for worker in workers):
            while waiting and sum(worker.cell is not None for worker in workers) < jobs:
                _give(_idle(workers), waiting.pop(0), make_task)
            busy = [worker for worker in workers if worker.cell is not None]
            ready = wait([worker.connection for worker in busy], timeout=POLL_PERIOD_S)
            for worker in busy:
                if worker.connection in ready:
                    cell, reason = _receive(worker)
                    if not reuse or not worker.process.is_alive():
                        workers.remove(worker)
                        _stop([worker])
                    on_end(cell, reason)
            on_tick([worker.cell for worker in workers if worker.cell is not None])


@contextlib.contextmanager
def _workers() -> "Iterator[list[_Worker]]":
    """Yield a list of workers, all of which are stopped in the end."""
    workers: list[_Worker] = []
    try:
        yield workers
    finally:
        _stop(workers)


def _idle(workers: list[_Worker]) -> _Worker:
    """Return a worker without a run, a new one if need be."""
    for worker in workers:
        if worker.cell is None:
            return worker
    context = multiprocessing.get_context("spawn")  # a fork would copy PyTorch's threads and CUDA's state, and fail
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs,), daemon=True)
    # Between its first instruction and its first line of Python a worker cannot ignore Ctrl-C by itself.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    process.start()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    theirs.close()  # so that the end of the process is the end of the pipe
    workers.append(_Worker(process, ours))
    return workers[-1]


def _give(worker: _Worker, cell: "Cell", make_task: "Callable[[Cell], Task]") -> None:
    worker.cell = cell
    worker.connection.send(make_task(cell))


def _receive(worker: _Worker) -> "tuple[Cell, str | None]":
    """Return the run that a worker has ended, with the reason if it failed; a worker that is gone has failed."""
    assert worker.cell is not None
    cell, worker.cell = worker.cell, None
    try:
        return cell, worker.connection.recv()
    except (EOFError, ConnectionResetError):
        worker.process.join()
        code = worker.process.exitcode
        return cell, f"its process {_how_it_went(code)}"


def _how_it_went(exit_code: int | None) -> str:
    """Return in words how a process ended that should not have."""
    if exit_code == 128 + signal.SIGTERM:
        return f"was stopped by signal {signal.SIGTERM:d}, after a checkpoint"
    if exit_code is not None and exit_code < 0:
        return f"was killed by signal {-exit_code}{' (out of memory?)' if exit_code == -signal.SIGKILL else ''}"
    return f"left with {exit_code}"


def _stop(workers: list[_Worker]) -> None:
    """Let workers without a run leave by themselves, which tidies up what libraries hold; stop those with a run.

    These first write a checkpoint. Who does not leave in time is killed, and so are all on a second Ctrl-C.
    """
    try:
        for worker in workers:
            worker.connection.close()
            if worker.cell is not None:
                worker.process.terminate()
        deadline = time.monotonic() + LEAVING_TIME_S
        for worker in workers:
            worker.process.join(max(0.0, deadline - time.monotonic()))
    finally:
        for worker in workers:
            worker.process.kill()
            worker.process.join()


def _work(connection: Connection) -> None:
    """Carry out runs as they come, until there is no one left to tell."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    while True:
        try:
            task = connection.recv()
        except (EOFError, ConnectionResetError):
            return
        reason = _carry_out(task)
        try:
            connection.send(reason)
        except OSError:  # the parent has gone meanwhile
            return


def _leave_with_parent() -> None:
    """End this process when its parent is gone, even by SIGKILL: no one would see the end of the run."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)  # a run writes a checkpoint
    time.sleep(LEAVING_TIME_S)
    os._exit(1)


def _carry_out(task: Task) -> str | None:
    """Carry out a run as :func:`run_into_log`.

    Raises:
        SystemExit: If this process is told to stop.
    """
    try:
        return run_into_log(task)
    except KeyboardInterrupt as interrupt:
        sys.exit(128 + getattr(interrupt, "signal_number", signal.SIGINT))


def run_into_log(task: Task) -> str | None:
    """Carry out a run and return None, or in one sentence why it failed; its log holds the rest.

    One run that fails, for whatever reason, does not stop the others; the campaign ends with its name.

    Args:
        task: The run.

    Raises:
        KeyboardInterrupt: If this process is told to stop.
    """
    reason = None
    try:
        with _output_to(task.log):
            try:
                _run(task)
            except KeyboardInterrupt as interrupt:
                print(interrupt, flush=True)
                raise
            except Exception as error:
                reason = failure_reason(error)
                traceback.print_exc()
    except OSError as error:  # the log itself: a full disk, a directory that is read-only or not one
        reason = reason or failure_reason(error)
    return reason


@contextlib.contextmanager
def _output_to(path: Path) -> Iterator[None]:
    """Append what is printed to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        named_in_errors(path),
        path.open("a", encoding="utf-8") as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        yield


def _run(task: Task) -> None:
    """Carry out a run, once a worker that holds it has left."""
    # Imported here, in the worker: the process that waits needs neither PyTorch's memory nor its time.
    import torch

    from kfac_sua.training.loop import run

    if task.config.num_threads is None and task.num_threads is not None:
        torch.set_num_threads(task.num_threads)
    deadline = time.monotonic() + BUSY_TIME_S
    while True:
        try:
            run(task.config)
            return
        except RunLostError:  # no one holds it: its directory is gone, and the next command starts it anew
            raise
        except RunBusyError:
            if time.monotonic() > deadline:
                raise
        time.sleep(BUSY_PERIOD_S)
