"""How long a campaign will take, estimated before it starts: from runs that have ended, or else from first steps."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from kfac_sua.build import build_splits
from kfac_sua.campaign.cell import Cell, CellState, each_once, read_state
from kfac_sua.campaign.conduct import settled
from kfac_sua.campaign.engine import Engine
from kfac_sua.campaign.estimate import Estimator, shown_seconds
from kfac_sua.campaign.first_steps import FirstSteps, StageKey
from kfac_sua.campaign.grid import Grid
from kfac_sua.campaign.plan import CurveKey, Plan
from kfac_sua.campaign.selection import Choice, Rule
from kfac_sua.config import DatasetConfig

CellStates = Sequence[tuple[Cell, CellState]]


@dataclasses.dataclass(frozen=True)
class Forecast:
    """The runs of a campaign that are left, and how long they will take.

    Attributes:
        estimator: Knows how long runs take.
        first: First steps, by stage and curve, where no run has completed an epoch.
        grid: Runs of the grids as they stand, with their states.
        finals: Final runs with their states. Until the grids are done, each is of the first cell instead of the chosen
            one, and takes as long.
        choices: The chosen cells; None until the grids are done.
        grid_s: Seconds until the grids are done; None if not known.
        growth_s: Most seconds that the growth of the grids may add.
        final_s: Seconds until the final runs are done.
    """

    estimator: Estimator
    first: Mapping[StageKey, FirstSteps]
    grid: CellStates
    finals: CellStates
    choices: list[Choice] | None
    grid_s: float | None
    growth_s: float | None
    final_s: float | None

    def lines(self) -> list[str]:
        """Return lines on how long the rest takes, and on the curves for which that is not known."""
        if not _to_do(self.grid) + _to_do(self.finals):
            return []
        runs = f"{_to_do(self.grid)} runs of the grid and {_to_do(self.finals)} final runs to do"
        problems = [
            f"How long {panel}/{method} takes is not known: {taken.problem}"
            for (_, (panel, method)), taken in self.first.items()
            if taken.problem
        ]
        if self.grid_s is None or self.final_s is None:
            return [f"{runs}; how long they take is known once a run of every curve has completed an epoch", *problems]
        growth = "" if self.growth_s == 0 else f", and up to {shown_seconds(self.growth_s)} more if all grids grow"
        return [f"{runs}: {shown_seconds(self.grid_s + self.final_s)} on this machine{growth}"]


def foretell(plan: Plan, rule: Rule, engine: Engine, *, with_data: bool) -> Forecast:
    """Return the runs of a campaign that are left, and how long they will take here.

    Args:
        plan: The campaign.
        rule: How the best cell of a grid is chosen.
        engine: Who carries out the runs, and takes first steps where nothing is known.
        with_data: Whether to load the images first, and to fetch them if they are missing.

    Raises:
        DataError: If images are missing and cannot be fetched, or are damaged.
    """
    grids, choices = settled(plan, rule)
    chosen = {(choice.panel, choice.method): (choice.lr, choice.damping) for choice in choices or ()}
    finals = plan.final_cells(chosen or {key: next(grid.points()) for key, grid in grids.items()})
    grid_cells = plan.all_grid_cells(grids)
    cells, grid_states, final_states = [*grid_cells, *finals], _states(grid_cells), _states(finals)
    to_do = [cell for cell, state in [*grid_states, *final_states] if not state.has_ended]
    if with_data:
        _check_data(to_do)
    first: Mapping[StageKey, FirstSteps] = {}
    if to_do:
        known = Estimator(cells, {})
        unknown = {(cell.stage, cell.curve): cell for cell in cells if not known.has_measured(cell)}
        if unknown:  # at full width on a CPU these steps take minutes
            print("taking a few steps of every curve, which tell how long all of them take", flush=True)
        first = engine.first_steps(list(unknown.values()))
    estimator = Estimator(cells, first, engine.runs_per_device)
    return Forecast(
        estimator,
        first,
        grid_states,
        final_states,
        choices,
        estimator.total(grid_states, engine.jobs),
        0.0 if choices else _growth_s(plan, grids, estimator, engine.jobs),
        estimator.total(final_states, engine.final_jobs),
    )


def _check_data(cells: Sequence[Cell]) -> None:
    """Load every data set once, which fetches it; if that fails, every single run would fail."""
    checked: list[DatasetConfig] = []
    for cell in cells:
        if cell.config.dataset not in checked:
            checked.append(cell.config.dataset)
            build_splits(cell.config.dataset)


def _states(cells: Sequence[Cell]) -> CellStates:
    """Return what is on disk of runs, each of them once."""
    return [(cell, read_state(cell)) for cell in each_once(cells)]


def _growth_s(plan: Plan, grids: Mapping[CurveKey, Grid], estimator: Estimator, jobs: int) -> float | None:
    """Return the seconds of all runs by which grids may still grow; runs that curves share count once."""
    each: dict[frozenset[Path], float] = {}
    for key, first in plan.grids().items():
        cells = plan.grid_cells(key, first)
        seconds = estimator.seconds(cells[0], CellState("missing", 0))
        if seconds is None:
            return None
        left = first.most_grown(plan.scale.growth_steps) - (len(list(grids[key].points())) - len(cells))
        each[frozenset(cell.directory.path for cell in cells)] = seconds * left
    return sum(each.values()) / jobs


def _to_do(states: CellStates) -> int:
    return sum(not state.has_ended for _, state in states)
