"""The stages of a campaign: the grid with its growth, the selection, and the final runs alone on the device."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from kfac_sua.campaign.cell import Cell, each_once, log_path, mark_failed, read_state
from kfac_sua.campaign.engine import Engine
from kfac_sua.campaign.estimate import Estimator, shown_seconds
from kfac_sua.campaign.first_steps import FirstSteps, StageKey
from kfac_sua.campaign.frames import collect_cells
from kfac_sua.campaign.grid import Grid
from kfac_sua.campaign.plan import CurveKey, Plan
from kfac_sua.campaign.progress import CampaignProgress
from kfac_sua.campaign.selection import Choice, Rule, select

# The last sentence gives the reasons of this many failures; the log of each run holds its own.
MAX_REASONS = 3


class CampaignError(Exception):
    """Runs of a campaign that failed; the message names each."""


@dataclass(frozen=True)
class Results:
    """The results of a campaign's runs.

    Attributes:
        grid_cells: All runs of the grids.
        final_cells: All final runs.
        grid: Their rows (``collect_cells``).
        finals: Their rows.
        choices: The chosen cell of every curve.
    """

    grid_cells: list[Cell]
    final_cells: list[Cell]
    grid: pd.DataFrame
    finals: pd.DataFrame
    choices: list[Choice]


def conduct(plan: Plan, rule: Rule, engine: Engine, first: Mapping[StageKey, FirstSteps]) -> Results:
    """Carry out all runs of a campaign that have not ended. ``foretell`` has fetched the images before.

    Args:
        plan: The campaign.
        rule: How the best cell of a grid is chosen.
        engine: Who carries out the runs.
        first: Seconds of first steps, by stage and curve, where no run has completed an epoch.

    Raises:
        CampaignError: If runs failed; the others have been carried out.
        LaunchError: If a launcher did not take them.
        SelectionError: If all cells of a grid diverged.
        ConfigError: If a run cannot be configured.
        KeyboardInterrupt: On Ctrl-C; the same call goes on.
    """
    grids, choices = settled(plan, rule)
    while choices is None:
        _run(f"{plan.campaign.name} grid", plan.all_grid_cells(grids), engine, first)
        grids, choices = settled(plan, rule)
    grid_cells = plan.all_grid_cells(grids)
    for choice in choices:
        damping = "" if choice.damping is None else f", damping {choice.damping:g}"
        edges = f"; {' and '.join(choice.edges)}" if choice.edges else ""
        print(
            f"chosen for {choice.panel}/{choice.method}: lr {choice.lr:g}{damping} of {choice.num_cells} cells"
            f" (train loss {choice.train_loss:.3f}, best val error {choice.val_error:.1%}){edges}",
            flush=True,
        )
    chosen = {(choice.panel, choice.method): (choice.lr, choice.damping) for choice in choices}
    final_cells = plan.final_cells(chosen)
    _run(f"{plan.campaign.name} final runs", final_cells, engine, first, is_final=True, like=grid_cells)
    grid, finals = collect_cells(plan.root, grid_cells), collect_cells(plan.root, final_cells)
    return Results(grid_cells, final_cells, grid, finals, choices)


def settled(plan: Plan, rule: Rule) -> tuple[dict[CurveKey, Grid], list[Choice] | None]:
    """Return the grids, grown as far as the runs on disk allow, and the cell chosen from each.

    A grid whose best cell lies on an edge grows by one step beyond it, as often as the scale allows.

    Args:
        plan: The campaign.
        rule: How the best cell of a grid is chosen.

    Returns:
        Grids per curve, and the chosen cells; None instead of the cells while runs of the grids are missing.
    """
    firsts = plan.grids()
    grids = dict(firsts)
    for growth in itertools.count():
        if not all(read_state(cell).has_ended for cell in plan.all_grid_cells(grids)):
            return grids, None
        choices = [_choose(plan, key, (firsts[key], grid), rule) for key, grid in grids.items()]
        grown = {key: grids[key].grown(choice.lr, choice.damping) for key, choice in zip(grids, choices, strict=True)}
        if grown == grids or growth == plan.scale.growth_steps:
            break
        grids = grown
    return grids, choices


def _choose(plan: Plan, key: CurveKey, grids: tuple[Grid, Grid], rule: Rule) -> Choice:
    cells = plan.grid_cells(key, grids[1])
    return select(collect_cells(plan.root, cells), key, grids, rule, cells[0].config.dataset.validation_size)


def _run(
    title: str,
    cells: Sequence[Cell],
    engine: Engine,
    first: Mapping[StageKey, FirstSteps],
    *,
    is_final: bool = False,
    like: Sequence[Cell] = (),
) -> None:
    """Carry out those runs that have not ended; ``like`` are further runs from which to estimate the time."""
    unique = each_once(cells)
    to_do = [(cell, state) for cell in unique if not (state := read_state(cell)).has_ended]
    if not to_do:
        print(f"{title}: all {len(unique)} runs are done", flush=True)
        return
    waiting, jobs = [cell for cell, _ in to_do], engine.final_jobs if is_final else engine.jobs
    estimator = Estimator([*unique, *like], first, engine.runs_per_device)
    left = shown_seconds(estimator.total(to_do, jobs))
    print(f"{title}: {len(waiting)} of {len(unique)} runs to do, {engine.how(is_final=is_final)}, {left}", flush=True)
    ended: list[str] = []
    failures: dict[str, str] = {}
    progress = CampaignProgress(title, unique, estimator, jobs)

    def end(cell: Cell, reason: str | None) -> None:
        if reason is None:
            state = read_state(cell)
            if not state.has_ended:  # although its process came to an end; it would be tried for ever
                reason = state.failure or f"{cell.directory.info} does not say how the run ended."
        else:
            mark_failed(cell, reason)
        progress.end(cell, reason)
        ended.append(cell.name)
        if reason is not None:
            failures[cell.name] = f"{reason.rstrip('.')} (log: {log_path(cell)})"

    try:
        engine.carry_out(waiting, is_final=is_final, on_end=end, on_tick=progress.tick)
    finally:
        progress.close()
    if failures or len(ended) < len(waiting):
        raise CampaignError(_failure_sentence(failures, len(waiting), len(waiting) - len(ended)))


def _failure_sentence(failures: Mapping[str, str], num_runs: int, num_left: int) -> str:
    """Name every run that failed, with the reasons of the first few, and the number of runs not begun."""
    reasons = [f"{name}: {reason}" for name, reason in list(failures.items())[:MAX_REASONS]]
    others = ", ".join(list(failures)[MAX_REASONS:])
    also = f"; and {others}" if others else ""
    failed = f"{len(failures)} of {num_runs} runs failed{': ' if reasons else ''}{'; '.join(reasons)}{also}."
    if num_left:
        return f"{failed} {num_left} were not begun. The same command tries the former again and begins the latter."
    return f"{failed} The same command tries these again, and no other."
