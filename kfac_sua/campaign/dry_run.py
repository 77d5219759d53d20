"""What a campaign would do: its runs, their states, and how long they will take."""

from kfac_sua.campaign.cell import Cell, CellState
from kfac_sua.campaign.engine import Engine
from kfac_sua.campaign.estimate import Estimator, shown_seconds
from kfac_sua.campaign.forecast import CellStates, Forecast
from kfac_sua.campaign.plan import Plan
from kfac_sua.campaign.selection import Rule


def describe(plan: Plan, rule: Rule, engine: Engine, forecast: Forecast) -> str:
    """Return a line per run with its state and the seconds it will take, and the sums.

    Args:
        plan: The campaign.
        rule: How the best cell of a grid is chosen.
        engine: Who would carry out the runs.
        forecast: The runs that are left, and how long they will take.
    """
    estimator, is_chosen = forecast.estimator, forecast.choices is not None
    lines = [
        f"{plan.campaign.title}, in {plan.root}",
        *([engine.description] if engine.description else []),
        *(_line(*each, estimator) for each in [*forecast.grid, *(forecast.finals if is_chosen else [])]),
        _sum("grid", forecast.grid, forecast.grid_s, engine.how(is_final=False)),
        _sum("final runs", forecast.finals, forecast.final_s, engine.how(is_final=True)),
    ]
    if not is_chosen:
        lines.append(
            f"The final runs are those of the cells chosen once the grid is done ({rule}). A grid whose best cell lies "
            f"on an edge grows by one step beyond it, at most {plan.scale.growth_steps} time(s)."
        )
    return "\n".join(lines)


def _line(cell: Cell, state: CellState, estimator: Estimator) -> str:
    if state.has_ended:
        return f"  {cell.name}: {state.status}"
    if state.failure is not None:
        status = f"failed: {state.failure.rstrip('.')}, will be retried"
    else:
        status = f"epoch {state.epochs} of {cell.config.epochs} done" if state.epochs else "to do"
    return f"  {cell.name}: {status}, {shown_seconds(estimator.seconds(cell, state))}"


def _sum(title: str, states: CellStates, seconds: float | None, how: str) -> str:
    done = sum(state.has_ended for _, state in states)
    return f"{title}: {len(states)} runs, {done} done, {len(states) - done} to do, {how}: {shown_seconds(seconds)}"
