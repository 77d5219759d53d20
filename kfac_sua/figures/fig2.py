"""Figure 2 of the paper: training (dashed) and validation error (solid) against training time, one panel per task.

Command line: ``python -m kfac_sua.figures.fig2 RUNS_ROOT --out DIR [--title T] [--methods baseline sua_grouped]``.

Means, bands and diverged runs are as in Figure 1. As dashes tell training from validation here, methods differ in
colour and marker; the markers of training curves are empty.
"""

if __name__ == "__main__":  # before the imports that take seconds
    from kfac_sua.startup import begin

    begin()

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from kfac_sua.command_line import BAD_INPUT, say
from kfac_sua.figures.curves import FigureError, Method, method_curves, without_comparators
from kfac_sua.figures.files import PAGE_WIDTH, write_figure
from kfac_sua.figures.lines import (
    Line,
    counts_text,
    draw_crosses,
    draw_legend,
    draw_lines,
    have_all_finished,
    legend_columns,
    limit_errors,
    point_rows,
    seeds_title,
)
from kfac_sua.figures.panels import check_uniform, method_names, panel_titles, with_names
from kfac_sua.figures.style import styles_with, wrapped
from kfac_sua.figures.titles import group_labels, panel_subjects, subject
from kfac_sua.methods import METHODS, MethodStyle
from kfac_sua.runs.collect import collect_runs, final_runs_root
from kfac_sua.runs.comparable import seconds_cautions
from kfac_sua.runs.final_table import CollectError, final_table, require_one_precision, require_runs, select_best
from kfac_sua.runs.run_info import ENDED, RecordError
from kfac_sua.runs.summary import format_table
from kfac_sua.startup import run_command

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

_TRAINING_DASHES = (0.0, (3.0, 1.5))
_VALIDATION, _TRAINING = "(validation)", "(training)"  # no method is called so
_COLUMNS = 3


def draw_figure2(
    frame: pd.DataFrame,
    panels: Sequence[tuple[str, str]],
    out_dir: Path,
    title: str | None = None,
    styles: Mapping[str, MethodStyle] = METHODS,
    name: str = "fig2",
) -> list[Path]:
    """Draw Figure 2.

    Args:
        frame: Rows of ``collect_runs`` with ``panel`` and ``method``: per panel one data set and one model, per panel
            and method one setting.
        panels: Names and titles of the panels to draw, in order.
        out_dir: Directory of the files, made if missing.
        title: Line above the panels.
        styles: Looks by method, in the order of the legend.
        name: File name without ending.

    Returns:
        Paths of the PNG (200 dpi), the SVG (same table, same bytes) and the CSV (the plotted numbers).

    Raises:
        FigureError: If a panel has no runs, or several data sets or models; if a method has no style, no run that has
            ended, several settings in a panel, or no training time covered by all its finished seeds.
        CollectError: If the runs drawn are of several precisions.
    """
    frame = with_names(frame)
    titles = panel_titles(frame, panels)
    frame = frame[frame["panel"].isin(list(titles))]
    require_one_precision(frame)
    drawn = {panel: _panel_methods(frame[frame["panel"] == panel], panel, styles) for panel in titles}
    columns = min(len(drawn), _COLUMNS)
    rows = -(-len(drawn) // columns)
    width = PAGE_WIDTH if columns > 1 else 0.65 * PAGE_WIDTH
    labels = _labels(drawn, styles)
    legend_rows = -(-len(labels) // legend_columns(list(labels.values()), width))

    def draw(figure: "Figure") -> None:
        grid = figure.subplots(rows, columns, squeeze=False).flatten()
        for axes in grid[len(drawn) :]:
            axes.remove()
        for index, (axes, panel) in enumerate(zip(grid, drawn, strict=False)):
            _draw_panel(axes, drawn[panel], styles)
            heading = _letter(index, len(drawn)) + titles[panel]
            axes.set_title(wrapped(heading, int(width / columns / 0.065)), loc="left", fontsize=8.5)
            axes.set(xlabel="Training time (s)", ylabel="" if index % columns else "Misclassification (%)")
        everything = [method for methods in drawn.values() for method in methods]
        draw_legend(figure, _handles(labels, styles), list(labels.values()), seeds_title(everything))

    size = (width, 0.6 + 2.4 * rows + 0.18 * legend_rows)
    cautions = seconds_cautions(frame)
    return write_figure(draw, _plotted_numbers(drawn), out_dir, name, size, title, cautions=cautions)


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw Figure 2 from all runs below a directory: a panel per task, in it the best setting per method.

    Args:
        arguments: Command line without the program's name; None reads it from the process.

    Returns:
        0 if it is drawn, otherwise 2, after a sentence on why it is not.
    """
    parser = argparse.ArgumentParser(prog="python -m kfac_sua.figures.fig2", description="Draw Figure 2.")
    parser.add_argument(
        "root", type=Path, metavar="RUNS_ROOT", help="directory searched for runs, or a campaign's (its final runs)"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="directory of the files")
    parser.add_argument("--title", help="line above the panels (the network and the data sets)")
    parser.add_argument(
        "--methods",
        nargs="+",
        metavar="NAME",
        help="names of preconditioners: only these, all of which each panel must have (all that have ended)",
    )
    options = parser.parse_args(arguments)
    try:
        runs = without_comparators(collect_runs(final_runs_root(options.root)))
        best = _best_per_panel(runs, options.methods)
        titles = list(panel_subjects(best).items())
        styles = styles_with(best["preconditioner"], group_labels(best, runs))
        paths = draw_figure2(best, titles, options.out, options.title or subject(best), styles)
    except (CollectError, RecordError, FigureError) as error:
        return say(error, BAD_INPUT)
    except OSError as error:
        return say(f"Cannot write the figure to {options.out}: {error.strerror or error}.", BAD_INPUT)
    print("Best setting per panel and method, by the lowest mean validation error:")
    print(format_table(final_table(best)))
    for caution in seconds_cautions(best):
        say(caution)
    print(f"Wrote {', '.join(map(str, paths))}.")
    return 0


def _best_per_panel(frame: pd.DataFrame, methods: Sequence[str] | None) -> pd.DataFrame:
    """Return the runs of the best setting per task and method; sorted, tasks are the paper's panels in their order."""
    if not frame["status"].isin(ENDED).any():
        require_runs(frame, methods or sorted(set(frame["preconditioner"])))
    parts = []
    for (dataset, model, width, schedule), runs in frame.groupby(["dataset", "model", "width", "schedule"]):
        if methods:
            runs = runs[runs["preconditioner"].isin(methods)]
            require_runs(runs, methods)
        if runs["status"].isin(ENDED).any():
            parts.append(select_best(runs).assign(panel=f"{dataset} {model} {width:g} {schedule}"))
    return pd.concat(parts, ignore_index=True)


def _panel_methods(rows: pd.DataFrame, panel: str, styles: Mapping[str, MethodStyle]) -> list[Method]:
    """Return what is drawn in a panel; errors name the panel."""
    check_uniform(rows, f"Panel {panel!r}")
    try:
        return [method_curves(name, rows[rows["method"] == name]) for name in method_names(rows, styles)]
    except FigureError as error:
        raise FigureError(f"Panel {panel!r}: {error}") from error


def _plotted_numbers(drawn: Mapping[str, list[Method]]) -> pd.DataFrame:
    """Return one row per plotted point."""
    rows = [
        row
        for panel, methods in drawn.items()
        for method in methods
        for quantity, curve in (("train_error_percent", method.train_error), ("val_error_percent", method.val_error))
        for row in point_rows(curve, {"panel": panel, "method": method.name, "quantity": quantity}, method.setting)
    ]
    setting = next(iter(drawn.values()))[0].setting
    return pd.DataFrame(rows, columns=["panel", "method", "quantity", "x", "mean", "low", "high", "seeds", *setting])


def _draw_panel(axes: "Axes", methods: list[Method], styles: Mapping[str, MethodStyle]) -> None:
    """Draw the training lines, then the validation lines."""
    from matplotlib.ticker import MaxNLocator

    training, validation = [], []
    for method in methods:
        look, has_finished = styles[method.name], method.has_finished
        training.append(Line(method.train_error, look, _TRAINING_DASHES, is_open=True, has_finished=has_finished))
        validation.append(Line(method.val_error, look, "-", is_open=False, has_finished=has_finished))
    draw_lines(axes, training)
    draw_lines(axes, validation)
    limit_errors(axes, [*training, *validation])
    draw_crosses(axes, [*training, *validation])
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))


def _labels(drawn: Mapping[str, list[Method]], styles: Mapping[str, MethodStyle]) -> dict[str, str]:
    """Return the legend: a text per method, with the outcomes of its runs if not all are the same, and per line."""
    everything = [method for methods in drawn.values() for method in methods]
    names = {method.name for method in everything}
    labels = {name: style.label for name, style in styles.items() if name in names}
    if not have_all_finished(everything):
        labels = {name: label + _outcomes(name, list(drawn.values())) for name, label in labels.items()}
    return labels | {_VALIDATION: "Validation", _TRAINING: "Training"}


def _outcomes(name: str, drawn: list[list[Method]]) -> str:
    """Return what follows a method's label: how many runs ended how, by panel unless it is the same in all."""
    texts = {
        _letter(index, len(drawn)): counts_text(method.counts)
        for index, methods in enumerate(drawn)
        for method in methods
        if method.name == name
    }
    if len(set(texts.values())) == 1:
        return f" ({next(iter(texts.values()))})"
    return ": " + "; ".join(letter + text for letter, text in texts.items())


def _letter(index: int, count: int) -> str:
    """Return what stands before a panel's title, nothing if there is one panel."""
    return f"({chr(ord('a') + index)}) " if count > 1 else ""


def _handles(labels: Mapping[str, str], styles: Mapping[str, MethodStyle]) -> "list[Line2D]":
    """Return the legend's artist for every label."""
    from matplotlib.lines import Line2D

    grey = "#555555"
    lines = {
        _VALIDATION: Line2D([], [], color=grey, marker="o"),
        _TRAINING: Line2D([], [], color=grey, marker="o", markerfacecolor="white", linestyle=_TRAINING_DASHES),
    }
    methods = {name: styles[name] for name in labels if name not in lines}
    lines |= {name: Line2D([], [], color=style.color, marker=style.marker) for name, style in methods.items()}
    return [lines[name] for name in labels]


if __name__ == "__main__":
    run_command(main)
