"""Processes that start without delay: copies of one process that has imported all that a run needs and never used CUDA.

When the process that starts them ends, however it ends, they end too, after a checkpoint; so does the one copied.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

# Seconds that a process has for its current step and its checkpoint when it is told to stop.
LEAVING_TIME_S = 30.0

# What a run imports, some of it late, and what the command imports, which its children import as their main module too:
# seconds of work. None of it uses CUDA, or no copy could use CUDA any more. None of it leaves a thread, which a copy
# would lack; the threads of OpenBLAS end before each copy is made and start again where they are needed.
PRELOADED = (
    "kfac_sua.training.loop",
    "kfac_sua.campaign.dry_run",
    "kfac_sua.campaign.publish",
    "sklearn.datasets",
    "torch._dynamo",
    "torch.utils.tensorboard.summary",
)

# macOS may end a copy of a process that has loaded its frameworks, so that CPython spawns there by default.
METHOD = "forkserver" if sys.platform == "linux" else "spawn"

# Signals that Ctrl-C and schedulers send to a whole group of processes. The process that is copied must outlive its
# copies, or no one would learn how they end. Before its first line of Python a process cannot ignore them by itself.
_HELD = {signal.SIGINT, signal.SIGTERM}


def start(
    target: Callable[[Connection], None], environment: Mapping[str, str] | None = None
) -> tuple[BaseProcess, Connection]:
    """Start a process. It gets the present environment of this process, and ignores Ctrl-C.

    Args:
        target: The function that it calls with its end of a pipe; a function of a module.
        environment: Further variables for it, set before anything can use CUDA.

    Returns:
        The process, and this end of the pipe, which ends with it.
    """
    context = multiprocessing.get_context(METHOD)
    ours, theirs = context.Pipe()
    arguments = (target, theirs, {**os.environ, **(environment or {})})
    process: BaseProcess = context.Process(target=_begin, args=arguments, daemon=True)  # type: ignore[attr-defined]
    resource_tracker.ensure_running()  # it would let the signals through that are held below
    if METHOD == "forkserver":
        context.set_forkserver_preload(list(PRELOADED))
        _start_from_server(process)
    else:
        with _held_signals():
            process.start()
    theirs.close()  # so that the end of the process is the end of the pipe
    return process, ours


def _start_from_server(process: BaseProcess) -> None:
    """Start a process from the fork server, and a new server if it is gone.

    A server that was killed refuses connections a moment before it is seen to be gone.
    """
    for pause in (0.1, 1.0, None):  # seconds: a busy machine may take longer to bury a process
        with _held_signals():
            forkserver.ensure_running()
        try:
            process.start()
        except ConnectionRefusedError:
            if pause is None:
                raise
            time.sleep(pause)
        else:
            return


@contextlib.contextmanager
def _held_signals() -> Iterator[None]:
    """Hold signals back inside, from this thread, and from the processes that it starts until they take them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _HELD)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin(target: Callable[[Connection], None], connection: Connection, environment: Mapping[str, str]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _HELD)
    os.environ.clear()  # the process that is copied has the environment of its own start
    os.environ.update(environment)
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    target(connection)


def _leave_with_parent() -> None:
    """End this process when its parent is gone, even by SIGKILL, as no one would see the end of the run."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)  # a run writes a checkpoint
    time.sleep(LEAVING_TIME_S)
    os._exit(1)
