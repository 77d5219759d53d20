"""Runs of a campaign as jobs of Hydra's launchers, handed over as a sweeper would.

A job returns the reason why its run failed and does not raise, so that the others go on. A job may also end before it
can return:

- If a job of submitit is killed, the campaign waits for all others, and then names it with its state and its own log.
- If a process of joblib is killed, joblib ends all runs. Those that had begun are named, the others are left.
- Ctrl-C and SIGTERM cancel every job that was submitted. On Slurm a run saves at the SIGTERM that ``scancel`` sends
  first; on one machine submitit gives it a second; joblib kills its processes, which lose what came after their last
  checkpoint. If the command itself is killed, its jobs go on. The next command waits for them, and then names the
  process and the host that hold a run.
- A job that Slurm pre-empts, requeues or stops at its time limit goes on from its checkpoint (``training/signals.py``).
"""

import contextlib
import functools
import itertools
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra._internal.callbacks import Callbacks
from hydra.core.plugins import Plugins
from hydra.types import HydraContext
from omegaconf import DictConfig

from kfac_sua.campaign.cell import Cell, log_path, read_state, run_log
from kfac_sua.campaign.launcher import JOBLIB, SLURM, SUBMITIT_LOCAL, Launcher
from kfac_sua.campaign.starting import LEAVING_TIME_S
from kfac_sua.campaign.worker import Task, run_into_log
from kfac_sua.compose import composed_hydra, quoted, to_config
from kfac_sua.compose.launchers import was_killed
from kfac_sua.device import choose_device
from kfac_sua.runs.directory import run_directory
from kfac_sua.runs.run_info import failure_reason
from kfac_sua.training.signals import Interrupted, StopRequest

# Seconds between two looks at what the jobs have written.
LOOK_PERIOD_S = 2.0
_POLL_PERIOD_S = 0.2
_ENDED_BY_JOBLIB = "a process of joblib was killed (out of memory?), which ends all others"

OnEnd = Callable[[Cell, str | None], None]
OnTick = Callable[[list[Cell]], None]
# A run, and the reason in one sentence if it failed.
Ended = tuple[Cell, str | None]


class LaunchError(Exception):
    """A launcher refused runs; the message is one sentence."""


def run_as_jobs(
    cells: Sequence[Cell],
    launcher: Launcher,
    root: Path,
    *,
    jobs: int,
    num_threads: int | None,
    on_end: OnEnd,
    on_tick: OnTick,
) -> None:
    """Carry out runs through a launcher of Hydra's, and wait for all of them.

    Args:
        cells: The runs.
        launcher: The launcher.
        root: Directory of the campaign, where the launcher keeps its own files.
        jobs: Runs at the same time, for a launcher without a limit of its own.
        num_threads: CPU threads of PyTorch where ``config.num_threads`` is null; None leaves PyTorch's choice.
        on_end: Called with each run that was begun, once it has ended, and with the reason, a sentence, if it failed.
        on_tick: Called every few seconds with the runs in progress.

    Raises:
        LaunchError: If the launcher did not take the runs.
        KeyboardInterrupt: On Ctrl-C, after the jobs have been cancelled.
    """
    size = jobs if launcher.name == SUBMITIT_LOCAL else len(cells)  # submitit starts all at once on one machine
    task = functools.partial(carry_out, num_threads=num_threads)
    with _Watch(cells, on_end, on_tick) as watch:
        for first in range(0, len(cells), size):
            batch = cells[first : first + size]
            watch.settle(_launch(batch, launcher, root, task))


def carry_out(raw: DictConfig, num_threads: int | None) -> str | None:
    """Carry out one run in a job, and return None, or the reason in one sentence if it failed.

    Args:
        raw: The composed configuration.
        num_threads: As for :func:`run_as_jobs`.
    """
    try:
        config = to_config(raw)
        log = run_log(run_directory(config, choose_device(config.device).type))
        return run_into_log(Task(config, log, num_threads))
    except KeyboardInterrupt as interrupt:
        number = getattr(interrupt, "signal_number", None)
        return f"its job was stopped{f' by signal {number:d}' if number else ''}, after a checkpoint"
    except Exception as error:
        return failure_reason(error)


def _launch(
    cells: Sequence[Cell], launcher: Launcher, root: Path, task: Callable[[DictConfig], str | None]
) -> list[Ended]:
    """Carry out runs at the same time, and return those that were begun, each with the reason if it failed."""
    sweep_dir = _new_directory(root / ".jobs")
    own = [f"hydra.sweep.dir={quoted(str(sweep_dir))}", "hydra/hydra_logging=none"]
    started_s = time.time()
    with composed_hydra(launcher.overrides, own) as (config, loader), _submitted_jobs(launcher) as jobs:
        instance = Plugins.instance().instantiate_launcher(
            hydra_context=HydraContext(config_loader=loader, callbacks=Callbacks()), task_function=task, config=config
        )
        try:
            returns = instance.launch([cell.overrides for cell in cells], 0)
            ends = [(cell, returned.return_value) for cell, returned in zip(cells, returns, strict=True)]
        except KeyboardInterrupt:
            _cancel(jobs)
            raise
        except Exception as error:
            ends = _ends(launcher, cells, jobs, error, started_s)
    if len(ends) == len(cells) and not any(reason for _, reason in ends):
        shutil.rmtree(sweep_dir, ignore_errors=True)  # without a failure, these logs hold nothing that others do not
    return ends


def _ends(
    launcher: Launcher, cells: Sequence[Cell], jobs: list[Any], error: Exception, started_s: float
) -> list[Ended]:
    """Return how each run ended after a launcher has raised, which says only that some run went wrong."""
    if jobs:  # of submitit, where the others go on
        try:
            return [(cell, _outcome(cell, job)) for cell, job in zip(cells, jobs, strict=True)]
        except KeyboardInterrupt:
            _cancel(jobs)
            raise
    if was_killed(error) and launcher.name == JOBLIB:
        begun = [cell for cell in cells if _has_begun(cell, started_s)]
        return [(cell, None if read_state(cell).has_ended else _ENDED_BY_JOBLIB) for cell in begun]
    raise LaunchError(f"The launcher did not take the runs: {' '.join(str(error).split())}") from error


def _outcome(cell: Cell, job: Any) -> str | None:
    """Wait for a job of submitit, and return why its run failed, if it did."""
    job.wait()
    if read_state(cell).has_ended:
        return None
    if job.paths.result_pickle.exists() and job.exception() is None:
        return job.result().return_value
    return f"its job {job.job_id} was killed or cancelled (state {job.state}; its own log: {job.paths.stderr})"


def _has_begun(cell: Cell, started_s: float) -> bool:
    log = log_path(cell)
    return log.exists() and log.stat().st_mtime >= started_s


@contextlib.contextmanager
def _submitted_jobs(launcher: Launcher) -> Iterator[list[Any]]:
    """Yield a list that receives the jobs of submitit, which Hydra's launcher does not give out."""
    jobs: list[Any] = []
    if launcher.name not in (SLURM, SUBMITIT_LOCAL):
        yield jobs
        return
    import submitit  # an optional package

    executors: Any = submitit.AutoExecutor
    map_array = executors.map_array

    def recording(executor: Any, *arguments: Any) -> Any:
        with StopRequest() as stop:  # an interrupt in between would leave jobs that no one knows of
            jobs.extend(map_array(executor, *arguments))
        if stop.signal_number is not None:
            raise Interrupted("interrupted.", stop.signal_number)
        return list(jobs)

    executors.map_array = recording
    try:
        yield jobs
    finally:
        executors.map_array = map_array


def _cancel(jobs: list[Any]) -> None:
    """Cancel jobs of submitit, and wait while they save; a second Ctrl-C stops the waiting."""
    left = [job for job in jobs if not job.done()]
    for job in left:
        job.cancel(check=False)
    deadline = time.monotonic() + LEAVING_TIME_S
    while time.monotonic() < deadline and not all(job.done() for job in left):
        time.sleep(_POLL_PERIOD_S)


def _new_directory(parent: Path) -> Path:
    """Make the next numbered directory."""
    parent.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(len(list(parent.iterdir()))):
        path = parent / str(number)
        if not path.exists():
            path.mkdir()
            return path
    raise AssertionError("there is always another number")


class _Watch:
    """Reports how each run ends, from its records, while a launcher waits for all of them.

    Args:
        cells: The runs.
        on_end: As for :func:`run_as_jobs`.
        on_tick: As for :func:`run_as_jobs`.
    """

    def __init__(self, cells: Sequence[Cell], on_end: OnEnd, on_tick: OnTick) -> None:
        self._waiting = {cell.directory.path: cell for cell in cells}
        self._on_end, self._on_tick = on_end, on_tick
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._look_again, daemon=True)

    def __enter__(self) -> "_Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def settle(self, ends: Sequence[Ended]) -> None:
        """Report the ends of runs that have not been reported yet."""
        with self._lock:
            for cell, reason in ends:
                self._end(cell, reason)

    def _end(self, cell: Cell, reason: str | None) -> None:
        if self._waiting.pop(cell.directory.path, None) is not None:
            self._on_end(cell, reason)

    def _look_again(self) -> None:
        while not self._stop.wait(LOOK_PERIOD_S):
            with self._lock:
                states = [(cell, read_state(cell)) for cell in self._waiting.values()]
                for cell, state in states:
                    if state.has_ended:
                        self._end(cell, None)
                self._on_tick([cell for cell, state in states if state.status == "running"])
