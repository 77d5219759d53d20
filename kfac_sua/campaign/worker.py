"""What a worker process does: it carries out runs, each with its output in a log, and frees the memory of each."""

import contextlib
import gc
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from kfac_sua.campaign.starting import LEAVING_TIME_S
from kfac_sua.config import Config
from kfac_sua.files.atomic import named_in_errors
from kfac_sua.files.lock import RunBusyError, RunLostError
from kfac_sua.files.openers import own_file
from kfac_sua.runs.run_info import failure_reason

# Seconds for which a worker whose parent was killed may still hold a run, as it leaves after a checkpoint too.
BUSY_TIME_S = LEAVING_TIME_S + 5.0
BUSY_PERIOD_S = 0.5


@dataclass(frozen=True)
class Task:
    """A run for a worker.

    Attributes:
        config: The run.
        log: File to which the output of the run is appended.
        num_threads: CPU threads of PyTorch where ``config.num_threads`` is null; None leaves PyTorch's choice.
    """

    config: Config
    log: Path
    num_threads: int | None


def work(connection: Connection) -> None:
    """Carry out runs as they come, until the other end of the connection is gone.

    Args:
        connection: Brings tasks, and takes for each None, or the reason if it failed.

    Raises:
        SystemExit: If this process is told to stop.
    """
    while True:
        try:
            task = connection.recv()
        except (EOFError, ConnectionResetError):
            return
        try:
            reason = run_into_log(task)
        except KeyboardInterrupt as interrupt:
            sys.exit(128 + getattr(interrupt, "signal_number", signal.SIGINT))
        try:
            connection.send(reason)
        except OSError:  # the parent has gone meanwhile
            return


def run_into_log(task: Task) -> str | None:
    """Carry out a run and return None, or the reason in one sentence if it failed; its log holds the rest.

    A run that fails, for whatever reason, does not stop the others. The campaign names it at its end.

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
    _give_memory_back()  # here, where no exception holds the frames of the run any more
    return reason


@contextlib.contextmanager
def _output_to(path: Path) -> Iterator[None]:
    """Append what is printed to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        named_in_errors(path),
        open(path, "a", encoding="utf-8", errors="surrogateescape", opener=own_file) as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        yield


def _run(task: Task) -> None:
    """Carry out a run, once a worker that holds it has left."""
    # Imported here, in the worker: the process that waits carries out no run.
    import torch

    from kfac_sua.training.loop import run

    if task.config.num_threads is None and task.num_threads is not None:
        torch.set_num_threads(task.num_threads)
    deadline = time.monotonic() + BUSY_TIME_S
    while True:
        try:
            run(task.config)
            return
        except RunLostError:  # no one holds it; its directory is gone, and the next command starts it anew
            raise
        except RunBusyError:
            if time.monotonic() > deadline:
                raise
        time.sleep(BUSY_PERIOD_S)


def _give_memory_back() -> None:
    """Free the memory of a run: this process may carry out others, and other processes share its GPU."""
    import torch

    gc.collect()
    if torch.cuda.is_initialized():
        torch._C._cuda_clearCublasWorkspaces()  # one for every stream that steps were captured on
        torch.cuda.empty_cache()
