"""Who carries out the runs of a campaign: worker processes of this command, or a launcher of Hydra's."""

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from kfac_sua.campaign.cell import Cell, Stage, log_path
from kfac_sua.campaign.first_steps import FirstSteps, StageKey, take_first_steps
from kfac_sua.campaign.gpus import Gpu, visible_alone
from kfac_sua.campaign.jobs import run_as_jobs
from kfac_sua.campaign.launcher import JOBLIB, SUBMITIT_LOCAL, Launcher
from kfac_sua.campaign.pool import run_all
from kfac_sua.campaign.worker import Task

# Five processes on an H200 carried out 44 runs of 3 epochs in 150 s. A run of this size leaves most of a GPU idle, but
# each process needs a CPU core that launches its operations.
RUNS_PER_GPU = 5
# GiB of a GPU for each run: a network of the paper with its factors, its graphs and a CUDA context. This is estimated,
# not measured: VGG11 at full width takes 0.4 GiB without the context.
MEMORY_PER_RUN_GIB = 8


class Engine(Protocol):
    """What a campaign needs to carry out its runs."""

    @property
    def jobs(self) -> int:
        """Runs of the grid at the same time."""

    @property
    def final_jobs(self) -> int:
        """Final runs at the same time: one, unless each has a device to itself, since their seconds are compared."""

    @property
    def description(self) -> str:
        """A line on what carries out the runs; empty if there is nothing to say."""

    @property
    def runs_per_device(self) -> float:
        """Runs of the grid on one device at the same time; each takes so many times as long as alone."""

    def how(self, *, is_final: bool) -> str:
        """Return how many runs are carried out at the same time, in words, and what each has."""

    def first_steps(self, cells: Sequence[Cell]) -> Mapping[StageKey, FirstSteps]:
        """Take a few steps of each run, or none if the runs will be carried out on another machine."""

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
            on_end: Called with each run that was begun, once it has ended, and with the reason if it failed.
            on_tick: Called now and then with the runs in progress.
        """


@dataclass(frozen=True)
class Workers:
    """Worker processes of this command.

    Attributes:
        jobs: Runs of the grid at the same time.
        gpus: The GPUs of this machine that they may use; none on a CPU.
    """

    jobs: int
    gpus: tuple[Gpu, ...] = ()

    @classmethod
    def sharing(cls, gpus: Sequence[Gpu], jobs: int | None = None) -> "Workers":
        """Return workers on GPUs or, without any, on the CPU.

        Args:
            gpus: The GPUs.
            jobs: Runs of the grid at the same time; None for as many as the device can take with a core each.
        """
        workers = cls(jobs or num_cores(), tuple(gpus))
        most = sum(_most_runs(gpu) for gpu in workers.grid_gpus)
        return workers if jobs or not gpus else cls(min(most, num_cores()), tuple(gpus))

    @property
    def grid_gpus(self) -> tuple[Gpu, ...]:
        """GPUs with the same precisions as the first: the precision decides in which directory a run lies."""
        return tuple(gpu for gpu in self.gpus if gpu.device.precisions == self.gpus[0].device.precisions)

    @property
    def final_gpus(self) -> tuple[Gpu, ...]:
        """GPUs of the same kind as the first, so that seconds can be compared."""
        return tuple(gpu for gpu in self.gpus if gpu.device == self.gpus[0].device)

    @property
    def final_jobs(self) -> int:
        """Final runs at the same time: one on each GPU of one kind, with a core at least."""
        return max(1, min(len(self.final_gpus), num_cores()))

    @property
    def description(self) -> str:
        """A line on the GPUs, on what limits the runs on them, and on which GPUs are left out."""
        if not self.gpus:
            return ""
        parts = [f"GPUs: {_kinds(self.gpus)}"]
        if any(_most_runs(gpu) < RUNS_PER_GPU for gpu in self.grid_gpus):
            parts.append(f"runs of the grid are left {MEMORY_PER_RUN_GIB} GiB each")
        if self.jobs == num_cores() < sum(_most_runs(gpu) for gpu in self.grid_gpus):
            parts.append(f"{self.jobs} cores bound the runs of the grid, as each needs one")
        if len(self.grid_gpus) < len(self.gpus):
            parts.append(f"grid on {_kinds(self.grid_gpus)}, as the others have other precisions")
        if len(self.final_gpus) < len(self.gpus):
            parts.append(f"final runs, whose seconds are compared, on {_kinds(self.final_gpus)}")
        return "; ".join(parts)

    @property
    def runs_per_device(self) -> float:
        """Runs of the grid on one GPU; 1 on a CPU, where each run has cores of its own."""
        return max(1.0, self.jobs / len(self.grid_gpus)) if self.gpus else 1.0

    def first_steps(self, cells: Sequence[Cell]) -> Mapping[StageKey, FirstSteps]:
        """Take a few steps of each run, alone on the first GPU or with the cores of one run."""
        threads = {Stage.grid: _fair_threads(self.jobs), Stage.final: _fair_threads(self.final_jobs)}
        return take_first_steps(cells, threads, visible_alone(self.gpus[0].entry) if self.gpus else {})

    def how(self, *, is_final: bool) -> str:
        """Return how many runs are carried out at the same time, in words, and on which GPUs."""
        if is_final:
            return "alone on the device" if self.final_jobs == 1 else f"one at a time on each of {self.final_jobs} GPUs"
        number = len(self.grid_gpus)
        per_gpu, others = divmod(self.jobs, max(1, number))
        if number > 1 and not others:
            return f"{per_gpu} at a time on each of {number} GPUs"
        return f"{self.jobs} at a time{f' on {number} GPU(s)' if number else ''}"

    def carry_out(
        self,
        cells: Sequence[Cell],
        *,
        is_final: bool,
        on_end: Callable[[Cell, str | None], None],
        on_tick: Callable[[list[Cell]], None],
    ) -> None:
        """Carry out runs; final ones alone on their device, each in a new process, so that none finds warm caches."""
        jobs, gpus = (self.final_jobs, self.final_gpus) if is_final else (self.jobs, self.grid_gpus)

        def make_task(cell: Cell) -> Task:
            return Task(cell.config, log_path(cell), _fair_threads(jobs))

        entries = [gpu.entry for gpu in gpus]
        run_all(cells, make_task, jobs=jobs, reuse=not is_final, gpus=entries, on_end=on_end, on_tick=on_tick)


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
        """A line on the launcher and the resources of each run."""
        return f"Launcher: {self.launcher.describe()}"

    @property
    def runs_per_device(self) -> float:
        """1, since a launcher gives each run what it asks for."""
        return 1.0

    def first_steps(self, cells: Sequence[Cell]) -> Mapping[StageKey, FirstSteps]:
        """Take a few steps of each run, or none if the runs will be carried out on other machines."""
        if self.launcher.has_machines_of_its_own:
            return {}
        own = self.launcher.num_threads
        threads = {Stage.grid: own or _fair_threads(self.jobs), Stage.final: own or _fair_threads(self.final_jobs)}
        return take_first_steps(cells, threads, {})

    def how(self, *, is_final: bool) -> str:
        """Return how many runs are carried out at the same time, in words."""
        if not is_final:
            return f"{self.jobs} at a time"
        if self.final_jobs == 1:
            return "alone on the device"
        return f"{self.final_jobs} at a time, each in a job of its own with the same resources"

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


def _most_runs(gpu: Gpu) -> int:
    """Return how many runs of the grid a GPU takes at the same time."""
    return max(1, int(min(RUNS_PER_GPU, gpu.device.memory_gib / MEMORY_PER_RUN_GIB)))


def _kinds(gpus: Sequence[Gpu]) -> str:
    numbers = Counter(gpu.device.name for gpu in gpus)
    return ", ".join(f"{number} × {name}" for name, number in numbers.items())


def _fair_threads(jobs: int) -> int | None:
    """Return an equal share of the cores for each run: with more, runs would wait for each other's threads."""
    return max(1, num_cores() // jobs) if jobs > 1 else None
