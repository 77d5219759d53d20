"""Processes that carry out runs, several at a time, and end with the process that started them."""

import contextlib
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING

from kfac_sua.campaign.gpus import least_busy, visible_alone
from kfac_sua.campaign.starting import LEAVING_TIME_S, start
from kfac_sua.campaign.worker import Task, work

if TYPE_CHECKING:
    from kfac_sua.campaign.cell import Cell

POLL_PERIOD_S = 1.0
# What multiprocessing reports as exit code of a worker once the process that it was copied from is gone.
UNKNOWN_EXIT_CODE = 255


@dataclass
class _Worker:
    process: BaseProcess
    connection: Connection
    gpu: str | None
    cell: "Cell | None" = None


def run_all(
    cells: "Sequence[Cell]",
    make_task: "Callable[[Cell], Task]",
    *,
    jobs: int,
    reuse: bool,
    gpus: Sequence[str] = (),
    on_end: "Callable[[Cell, str | None], None]",
    on_tick: "Callable[[list[Cell]], None]",
) -> None:
    """Carry out runs in worker processes.

    Args:
        cells: The runs, in the order in which they are started.
        make_task: Returns what a worker needs to know about a run.
        jobs: Runs at the same time.
        reuse: Whether a worker takes one run after the other, which saves the imports. Otherwise each run has a
            process of its own, so that none finds warm caches that another lacks.
        gpus: GPUs over which the runs are spread; each process sees one of them. Without any, each process sees all.
        on_end: Called with each run that has ended, and with the reason in one sentence if it failed.
        on_tick: Called about once a second with the runs in progress.

    Raises:
        KeyboardInterrupt: On Ctrl-C, after the workers have been stopped.
    """
    waiting = list(cells)
    with _workers() as workers:
        while waiting or any(worker.cell for worker in workers):
            while waiting and len(busy := [worker for worker in workers if worker.cell is not None]) < jobs:
                gpu = least_busy(gpus, [worker.gpu for worker in busy])
                worker = _idle(workers, gpu)
                worker.cell = waiting.pop(0)
                worker.connection.send(make_task(worker.cell))
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


def _idle(workers: list[_Worker], gpu: str | None) -> _Worker:
    """Return a worker on a GPU that has no run; a new one if there is none."""
    for worker in workers:
        if worker.cell is None and worker.gpu == gpu:
            return worker
    process, connection = start(work, visible_alone(gpu))
    workers.append(_Worker(process, connection, gpu))
    return workers[-1]


def _receive(worker: _Worker) -> "tuple[Cell, str | None]":
    """Return the run that a worker has ended, and the reason if it failed; a run whose worker is gone has failed."""
    assert worker.cell is not None
    cell, worker.cell = worker.cell, None
    try:
        return cell, worker.connection.recv()
    except (EOFError, ConnectionResetError):
        worker.process.join()
        code = worker.process.exitcode
        return cell, f"its process {_how_it_went(code)}"


def _how_it_went(exit_code: int | None) -> str:
    """Return in words how a process ended that should have gone on."""
    if exit_code == 128 + signal.SIGTERM:
        return f"was stopped by signal {signal.SIGTERM:d}, after a checkpoint"
    if exit_code is not None and exit_code < 0:
        return f"was killed by signal {-exit_code}{' (out of memory?)' if exit_code == -signal.SIGKILL else ''}"
    if exit_code == UNKNOWN_EXIT_CODE:
        return "has ended, and so has the one that would know how (killed? out of memory?)"
    return f"left with {exit_code}"


def _stop(workers: list[_Worker]) -> None:
    """Let workers without a run leave by themselves; stop those with a run.

    A worker with a run first writes a checkpoint. One that does not leave in time is killed; a second Ctrl-C kills all.
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
