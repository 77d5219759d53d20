"""How the settings of the final runs were chosen, as Markdown: grids, budgets, choices."""

import math
from collections.abc import Mapping, Sequence

import pandas as pd

from kfac_sua.campaign.definition import Campaign, Panel
from kfac_sua.campaign.report.panels import curve_rows, method_label, per_panel
from kfac_sua.campaign.report.paper import run_sizes
from kfac_sua.campaign.selection import Choice
from kfac_sua.markdown import NOTHING, bullets, count, escape, join, listed, number, percent, table
from kfac_sua.runs.run_info import RunInfo

_COLUMNS = (
    ("Method", "left"),
    *(
        (name, "right")
        for name in (
            *("Learning rates", "Dampings", "Runs", "Grown", "Diverged", "At chance"),
            *("Chosen lr", "Chosen damping", "Validation error, best", "Training loss"),
        )
    ),
)


def tuning_section(
    campaign: Campaign, grid: pd.DataFrame, choices: Sequence[Choice], rule: str, infos: Sequence[RunInfo]
) -> str:
    """Return the grid of every method, whether budgets were equal, and what was chosen by which rule.

    Args:
        campaign: Panels and methods, in their order.
        grid: Rows of ``collect_runs`` of all grid cells, with ``panel`` and ``method``.
        choices: What was chosen.
        rule: The selection rule as a sentence.
        infos: run.json of all runs.
    """
    chosen = {(choice.panel, choice.method): choice for choice in choices}
    sizes = run_sizes(grid, infos)
    explanation = (
        f"Selection rule: {escape(rule)} The test set takes no part in it. Every cell of a grid is one run of one seed"
        f"{f', of {sizes}' if sizes else ''}; a grid whose best cell lies on an edge grows by a step beyond that edge,"
        " a limited number of times. A cell has diverged if its loss became non-finite; it is at chance if its last"
        " training loss is no lower than the untrained network's."
    )

    def section(panel: Panel) -> str:
        rows = [_row(campaign, panel, curve.method, grid, chosen) for curve in panel.curves]
        notes = [*_edge_notes(campaign, panel, chosen), *_failure_notes(campaign, panel, grid)]
        return join([_budgets(campaign, panel, grid, chosen), table(_COLUMNS, rows), bullets(notes)])

    return join([explanation, per_panel(campaign, section)])


def budget_sentence(cells: Mapping[str, int], grown: Mapping[str, int]) -> str:
    """Return a sentence on whether all methods were tuned with the same number of runs.

    Args:
        cells: Runs per method, including cells by which a grid grew; keys are labels, already Markdown.
        grown: How many of these were added beyond an edge.
    """
    if len(cells) < 2:
        return f"Tuning budget in runs: {_each(cells) or 'none'}."
    amounts = set(cells.values())
    if len(amounts) == 1:
        return f"Tuning budgets are **equal**: {count(amounts.pop(), 'run')} for each of {len(cells)} methods."
    before = {label: runs - grown[label] for label, runs in cells.items()}
    if len(set(before.values())) == 1:
        reason = f"Before grids grew beyond an edge, all methods had {min(before.values())}."
    elif any(grown.values()):
        reason = f"They differed before grids grew, too ({_each(before)})."
    else:
        reason = "No grid has grown: they differ from the start."
    return f"Tuning budgets in runs are **not equal** ({_each(cells)}). {reason}"


def _each(amounts: Mapping[str, int]) -> str:
    """Return amounts per label; labels contain commas."""
    return "; ".join(f"{label}: {amount}" for label, amount in amounts.items())


def _budgets(campaign: Campaign, panel: Panel, grid: pd.DataFrame, chosen: Mapping[tuple[str, str], Choice]) -> str:
    methods = [curve.method for curve in panel.curves]
    labels = {method: method_label(campaign, method) for method in methods}
    cells = {labels[method]: curve_rows(grid, panel.name, method)["run"].nunique() for method in methods}
    grown = {
        labels[method]: chosen[panel.name, method].num_grown if (panel.name, method) in chosen else 0
        for method in methods
    }
    return budget_sentence(cells, grown)


def _row(
    campaign: Campaign, panel: Panel, method: str, grid: pd.DataFrame, chosen: Mapping[tuple[str, str], Choice]
) -> list[str]:
    runs = curve_rows(grid, panel.name, method).drop_duplicates("run")
    choice = chosen.get((panel.name, method))
    row = [
        method_label(campaign, method),
        _axis(runs["base_lr"]),
        _axis(runs["damping"]),
        str(len(runs)),
        NOTHING if choice is None else str(choice.num_grown),
        str(int((runs["status"] == "diverged").sum())),
        str(_num_at_chance(curve_rows(grid, panel.name, method))),
    ]
    if choice is None:
        return [*row, *[NOTHING] * 4]
    damping = NOTHING if choice.damping is None else f"**{choice.damping:g}**"
    return [*row, f"**{choice.lr:g}**", damping, percent(choice.val_error), number(choice.train_loss)]


def _num_at_chance(rows: pd.DataFrame) -> int:
    """Return how many finished cells ended with a training loss no lower than that of the untrained network."""
    runs = rows[rows["status"] == "finished"].sort_values("epoch").groupby("run")
    return int((runs["train_loss"].last() >= runs["train_loss"].first()).sum())


def _axis(values: "pd.Series[float]") -> str:
    """Return the bounds of an axis and the number of values on it."""
    tried = sorted({float(value) for value in values if not math.isnan(value)})
    if len(tried) < 2:
        return f"{tried[0]:g}" if tried else NOTHING
    return f"{tried[0]:g} to {tried[-1]:g} ({len(tried)})"


def _edge_notes(campaign: Campaign, panel: Panel, chosen: Mapping[tuple[str, str], Choice]) -> list[str]:
    """Name the choices on an edge, where a better cell may lie outside the grid."""
    choices = [chosen[panel.name, curve.method] for curve in panel.curves if (panel.name, curve.method) in chosen]
    notes = [
        f"{method_label(campaign, choice.method)}: the choice is on an edge of its grid,"
        f" {escape(listed(choice.edges))}; a better one may lie beyond."
        for choice in choices
        if choice.edges
    ]
    missing = [curve.method for curve in panel.curves if (panel.name, curve.method) not in chosen]
    notes += [f"{method_label(campaign, method)}: no cell was chosen, since none has finished." for method in missing]
    return notes if notes or not choices else ["No chosen cell lies on an edge of its grid."]


def _failure_notes(campaign: Campaign, panel: Panel, grid: pd.DataFrame) -> list[str]:
    """Name the cells that diverged, failed or have not finished."""
    notes = []
    for curve in panel.curves:
        runs = curve_rows(grid, panel.name, curve.method).drop_duplicates("run").sort_values(["base_lr", "damping"])
        for status, words in (("diverged", "diverged at"), ("failed", "failed at"), ("running", "has not finished at")):
            cells = [
                f"lr {lr:g}" if math.isnan(damping) else f"lr {lr:g}, damping {damping:g}"
                for lr, damping in runs.loc[runs["status"] == status, ["base_lr", "damping"]].to_numpy()
            ]
            if cells:
                notes.append(f"{method_label(campaign, curve.method)}: {words} {'; '.join(cells)}.")
    return notes
