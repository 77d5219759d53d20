"""How long the runs to come will take: from those that are done, or else from first steps."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from kfac_sua.campaign.cell import Cell, CellState, Stage, sound_records
from kfac_sua.campaign.first_steps import FirstSteps, StageKey
from kfac_sua.config import Config
from kfac_sua.data.sizes import SIZES

# A forward pass is about a third of a training step on the same images.
EVALUATION_PER_STEP = 1 / 3


class Estimator:
    """Estimates seconds of runs.

    Args:
        cells: Runs to learn from, whatever their state.
        first: Seconds of first steps, by stage and curve, where no run has completed an epoch.
        sharing: Runs of the grid on one device at the same time; each takes so many times as long as alone.
    """

    def __init__(self, cells: Iterable[Cell], first: Mapping[StageKey, FirstSteps], sharing: float = 1) -> None:
        self._first, self._sharing = first, sharing
        self._measured: dict[StageKey, dict[Path, float]] = {}
        for cell in cells:
            self.learn(cell)

    def learn(self, cell: Cell) -> None:
        """Remember the seconds per step of a run, if it has completed an epoch."""
        records = sound_records(cell)
        if records and records[-1].step:
            per_step = records[-1].train_time_s / records[-1].step
            self._measured.setdefault((cell.stage, cell.curve), {})[cell.directory.path] = per_step

    def has_measured(self, cell: Cell) -> bool:
        """Whether a run of the same stage and curve has completed an epoch."""
        return (cell.stage, cell.curve) in self._measured

    def seconds(self, cell: Cell, state: CellState) -> float | None:
        """Return the seconds until a run has ended; None if nothing is known about runs like it.

        Args:
            cell: The run.
            state: What is on disk of it.
        """
        if state.has_ended:
            return 0.0
        per_step = self._per_step(cell)
        if per_step is None:
            return None
        first = self._first.get((cell.stage, cell.curve))
        setup_s = 0.0 if first is None else first.setup_s
        if first is not None and cell.stage is Stage.final:  # each final run starts a process of its own
            setup_s += first.start_s
        return setup_s + per_step * num_steps(cell.config) * (1 - state.epochs / cell.config.epochs)

    def total(self, cells: Sequence[tuple[Cell, CellState]], jobs: int = 1) -> float | None:
        """Return the seconds until several runs have ended; None if one is unknown.

        Args:
            cells: Runs and what is on disk of them.
            jobs: Runs at the same time.
        """
        each = [self.seconds(cell, state) for cell, state in cells]
        known = [seconds for seconds in each if seconds is not None]
        if len(known) < len(each):
            return None
        return max(sum(known) / jobs, max(known, default=0.0))  # a last long run cannot be shared out

    def _per_step(self, cell: Cell) -> float | None:
        """Return the seconds per step of runs of the same stage and curve."""
        key = (cell.stage, cell.curve)
        if measured := self._measured.get(key):
            return statistics.median(measured.values())
        first = self._first.get(key)
        if first is None or first.step_s is None:
            return None
        return first.step_s * (self._sharing if cell.stage is Stage.grid else 1)


def num_steps(config: Config) -> float:
    """Return the work of a run in training steps, evaluation included."""
    size, num_val = SIZES[config.dataset.name], config.dataset.validation_size
    num_train = min(config.dataset.train_size or size.train, size.train - num_val)
    num_train_eval = min(config.dataset.train_eval_size or num_train, num_train)
    evaluated = (config.epochs + 1) * (num_val + num_train_eval) + size.test
    batch_size = min(config.batch_size, num_train)
    return config.epochs * (num_train // batch_size) + EVALUATION_PER_STEP * evaluated / batch_size


def shown_seconds(seconds: float | None) -> str:
    """Return a duration as a person would say it, such as ``about 38 min``."""
    if seconds is None:
        return "an unknown time"
    if seconds < 90:
        return f"about {seconds:.0f} s"
    return f"about {seconds / 60:.0f} min" if seconds < 5400 else f"about {seconds / 3600:.1f} h"
