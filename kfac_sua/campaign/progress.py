"""What a campaign prints while it runs: one bar for all of its runs in a terminal, one line per run elsewhere."""

import sys
import time
from collections.abc import Sequence

from tqdm import tqdm

from kfac_sua.campaign.cell import Cell, CellState, read_state, sound_records
from kfac_sua.campaign.estimate import Estimator, shown_seconds

# Seconds between two looks at the records of the runs in progress.
LOOK_PERIOD_S = 2.0


class CampaignProgress:
    """Shows how far a set of runs is: done, running, diverged, failed, and the time left.

    Args:
        title: Text of the bar.
        cells: All runs, including those that have ended.
        estimator: Estimates how long runs take, and learns from them.
        jobs: Runs at the same time.
    """

    def __init__(self, title: str, cells: Sequence[Cell], estimator: Estimator, jobs: int) -> None:
        self._cells, self._estimator, self._jobs = cells, estimator, jobs
        self._states = {id(cell): read_state(cell) for cell in cells}
        self._failed: set[int] = set()
        self._running: list[Cell] = []
        self._next_look = 0.0
        self._is_bar = sys.stderr.isatty()
        self._bar = tqdm(
            total=sum(cell.config.epochs for cell in cells),
            desc=title,
            unit="epoch",
            dynamic_ncols=True,
            disable=not self._is_bar,
            bar_format="{desc}: {percentage:3.0f}%|{bar}| {postfix}",
        )
        self._show()

    def tick(self, running: list[Cell]) -> None:
        """Read the records of the runs in progress, if the last look is long enough ago.

        Args:
            running: The runs in progress.
        """
        self._running = running
        if time.monotonic() < self._next_look:
            return
        self._next_look = time.monotonic() + LOOK_PERIOD_S
        for cell in running:
            self._states[id(cell)] = read_state(cell)
            self._estimator.learn(cell)
        self._show()

    def end(self, cell: Cell, reason: str | None) -> None:
        """Show how a run has ended.

        Args:
            cell: The run.
            reason: Why it failed; None if it did not.
        """
        self._states[id(cell)] = read_state(cell)
        self._running = [other for other in self._running if other is not cell]
        if reason is not None:
            self._failed.add(id(cell))
        self._estimator.learn(cell)
        how = f"failed: {reason}" if reason else _outcome(cell, self._states[id(cell)])
        line = f"[{self._num_ended()}/{len(self._cells)}] {cell.name}: {how}"
        if self._is_bar:
            self._bar.write(line, file=sys.stderr)
        else:
            print(f"{line} [{self._summary()}]", flush=True)
        self._show()

    def close(self) -> None:
        """End the bar's line."""
        self._bar.close()

    def _num_ended(self) -> int:
        return sum(state.has_ended for state in self._states.values())

    def _show(self) -> None:
        epochs = sum(cell.config.epochs if state.has_ended else state.epochs for cell, state in self._each())
        self._bar.n = epochs
        self._bar.set_postfix_str(self._summary())

    def _summary(self) -> str:
        """Return the counts, and the time left."""
        diverged = sum(state.status == "diverged" for state in self._states.values())
        counts = [f"{self._num_ended()} of {len(self._cells)} done", f"{len(self._running)} running"]
        counts += [f"{diverged} diverged"] if diverged else []
        counts += [f"{len(self._failed)} failed"] if self._failed else []
        left = self._estimator.total([each for each in self._each() if id(each[0]) not in self._failed], self._jobs)
        return ", ".join([*counts, f"{shown_seconds(left)} left"])

    def _each(self) -> list[tuple[Cell, CellState]]:
        return [(cell, self._states[id(cell)]) for cell in self._cells]


def _outcome(cell: Cell, state: CellState) -> str:
    """Return the result of a run in a few words."""
    records = sound_records(cell)
    if state.status == "diverged" or not records:
        return f"{state.status} after epoch {state.epochs}"
    last = records[-1]
    best = min(record.val_error for record in records)
    return f"train loss {last.train_loss:.3f}, best val error {best:.1%}, {last.train_time_s:.0f} s"
