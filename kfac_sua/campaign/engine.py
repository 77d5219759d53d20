"""Who carries out the runs of a campaign: worker processes of this command, or a launcher of Hydra's."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from kfac_sua.campaign.cell import Cell, log_path
from kfac_sua.campaign.jobs import run_as_jobs
from kfac_sua.campaign.launcher import JOBLIB, SUBMITIT_LOCAL, Launcher
from kfac_sua.campaign.pool import run_all
from kfac_sua.campaign.worker import Task


class Engine(Protocol):
    """What a campaign needs of those who carry out its runs."""

    @property
    def jobs(self) -> int:
        """Runs of the grid at the same time."""

    @property
    def final_jobs(self) -> int:
        """Final runs at the same time, whose seconds are compared: one, unless each has a machine to itself."""

    @property
    def description(self) -> str:
        """Who carries out the runs, and with what; empty if there is nothing to say."""

    def carry_out(
        self,
        cells: Sequence[Cell],
        *,
        is_final: bool,
        on_end: Callable[[Cell, str | None], None],
        on_tick: Callable[[list[Cell]], None],
    ) -> None:
        """Carry out runs and wait for them.

        Args:
            cells: The runs, none of which has ended.
            is_final: Whether their seconds are compared.
            on_end: Called with each run that was begun, once it has ended, and, if it failed, the reason.
            on_tick: Called now and then with the runs in progress.
        """


@dataclass(frozen=True)
class Workers:
    """Worker processes of this command.

    Attributes:
        jobs: Runs of the grid at the same time.
    """

    jobs: int
    final_jobs: int = 1
    description: str = ""

    def carry_out(
        self,
        cells: Sequence[Cell],
        *,
        is_final: bool,
        on_end: Callable[[Cell, str | None], None],
        on_tick: Callable[[list[Cell]], None],
    ) -> None:
        """Carry out runs: final ones alone, each in a process that finds no warm caches."""
        jobs = self.final_jobs if is_final else self.jobs

        def make_task(cell: Cell) -> Task:
            return Task(cell.config, log_path(cell), _fair_threads(jobs))

        run_all(cells, make_task, jobs=jobs, reuse=not is_final, on_end=on_end, on_tick=on_tick)


@dataclass(frozen=True)
class Jobs:
    """Jobs of a launcher of Hydra's.

    Attributes:
        launcher: The launcher.
        root: Directory of the campaign.
    """

    launcher: Launcher
    root: Path

    @property
    def jobs(self) -> int:
        """Runs of the grid at the same time."""
        return self.launcher.jobs if self.launcher.jobs > 0 else num_cores()

    @property
    def final_jobs(self) -> int:
        """Final runs at the same time."""
        return self.jobs if self.launcher.has_machines_of_its_own else 1

    @property
    def description(self) -> str:
        """The launcher with what each run gets."""
        return self.launcher.describe()

    def carry_out(
        self,
        cells: Sequence[Cell],
        *,
        is_final: bool,
        on_end: Callable[[Cell, str | None], None],
        on_tick: Callable[[list[Cell]], None],
    ) -> None:
        """Carry out runs, each in a job of its own.

        Raises:
            LaunchError: If the launcher does not take them.
        """
        if is_final and self.launcher.name == JOBLIB:  # whose processes take run after run, with warm caches
            Workers(1).carry_out(cells, is_final=True, on_end=on_end, on_tick=on_tick)
            return
        jobs = self.final_jobs if is_final else self.jobs
        threads = self.launcher.num_threads
        if threads is None and self.launcher.name == SUBMITIT_LOCAL:
            threads = _fair_threads(jobs)
        run_as_jobs(cells, self.launcher, self.root, jobs=jobs, num_threads=threads, on_end=on_end, on_tick=on_tick)


def num_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _fair_threads(jobs: int) -> int | None:
    """Share the cores among the runs at the same time, or they would wait for each other's threads."""
    return max(1, num_cores() // jobs) if jobs > 1 else None
