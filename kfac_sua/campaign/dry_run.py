"""What a campaign would do: its runs, their state, and the time they will take."""

from kfac_sua.campaign.cell import Cell, CellState, read_state
from kfac_sua.campaign.conduct import settled
from kfac_sua.campaign.engine import Engine
from kfac_sua.campaign.estimate import Estimator, shown_seconds
from kfac_sua.campaign.plan import Plan
from kfac_sua.campaign.selection import Rule


def describe(plan: Plan, rule: Rule, engine: Engine) -> str:
    """Return a line per run with its state and the seconds it will take, and the sums.

    Args:
        plan: The campaign.
        rule: How the best cell of a grid is chosen.
        engine: Who would carry out the runs.
    """
    grids, choices = settled(plan, rule)
    grid_cells = plan.all_grid_cells(grids)
    chosen = {(choice.panel, choice.method): (choice.lr, choice.damping) for choice in choices or ()}
    # Until the grid is done any of its cells stands for the chosen one: all take equally long.
    finals = plan.final_cells(chosen or {key: next(grid.points()) for key, grid in grids.items()})
    estimator = Estimator([*grid_cells, *finals], plan.scale.seconds_per_step)
    grid_states, final_states = ([(cell, read_state(cell)) for cell in cells] for cells in (grid_cells, finals))
    grid_s, final_s = estimator.total(grid_states, engine.jobs), estimator.total(final_states, engine.final_jobs)
    both = None if grid_s is None or final_s is None else grid_s + final_s
    lines = [
        f"{plan.campaign.title}, in {plan.root}",
        *([engine.description] if engine.description else []),
        *(_line(*each, estimator) for each in [*grid_states, *(final_states if chosen else [])]),
        _sum("grid", grid_states, grid_s, engine.how(is_final=False)),
        _sum("final runs", final_states, final_s, engine.how(is_final=True)),
        f"together {shown_seconds(both)}",
    ]
    if not chosen:
        lines.append(
            f"The final runs are those of the cells chosen once the grid is done ({rule}). A grid whose best cell lies "
            f"on an edge grows by one step beyond it, at most {plan.scale.growth_steps} time(s), which comes on top."
        )
    if plan.scale.measured_on:
        lines.append(f"The time of curves that have not run here is that of {plan.scale.measured_on}.")
    return "\n".join(lines)


def _line(cell: Cell, state: CellState, estimator: Estimator) -> str:
    left = "" if state.has_ended else f", {shown_seconds(estimator.seconds(cell, state))}"
    return f"  {cell.name}: {_status(cell, state)}{left}"


def _status(cell: Cell, state: CellState) -> str:
    if state.has_ended:
        return state.status
    if state.failure is not None:
        return f"failed: {state.failure.rstrip('.')}, will be retried"
    return f"epoch {state.epochs} of {cell.config.epochs} done" if state.epochs else "to do"


def _sum(title: str, states: list[tuple[Cell, CellState]], seconds: float | None, how: str) -> str:
    done = sum(state.has_ended for _, state in states)
    return f"{title}: {len(states)} runs, {done} done, {len(states) - done} to do, {how}: {shown_seconds(seconds)}"
