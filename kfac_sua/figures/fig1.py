"""Figure 1 of the paper: training loss per epoch (left) and validation error against training time (right).

Command line: ``python -m kfac_sua.figures.fig1 RUNS_ROOT --out DIR [--title T] [--methods sua kfac]``.

Lines are means over seeds and bands run from the lowest to the highest seed, which with the usual three to
five seeds says more than an estimated standard deviation. Only runs of equal outcome are averaged: a method's
finished seeds, or, if all of its seeds diverged, these, up to their last common finite epoch, which a cross
marks. The legend counts the seeds that diverged, failed or are still running.
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
from kfac_sua.config import PreconditionerName
from kfac_sua.figures.curves import FigureError, Method, method_curves, without_comparators
from kfac_sua.figures.files import PAGE_WIDTH, write_figure
from kfac_sua.figures.lines import (
    Line,
    counts_text,
    draw_crosses,
    draw_legend,
    draw_lines,
    extent,
    have_all_finished,
    limit_errors,
    method_lines,
    point_rows,
    seeds_title,
)
from kfac_sua.figures.panels import check_uniform, method_names, with_names
from kfac_sua.figures.style import styles_with
from kfac_sua.figures.titles import group_labels, subject
from kfac_sua.methods import METHODS, MethodStyle
from kfac_sua.runs.collect import collect_runs, final_runs_root
from kfac_sua.runs.comparable import seconds_cautions
from kfac_sua.runs.final_table import CollectError, final_table, require_one_precision, require_runs, select_best
from kfac_sua.runs.run_info import RecordError
from kfac_sua.runs.summary import format_table
from kfac_sua.startup import run_command

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

_PAPER_METHODS = [name.value for name in PreconditionerName]


def draw_figure1(
    frame: pd.DataFrame,
    out_dir: Path,
    title: str | None = None,
    styles: Mapping[str, MethodStyle] = METHODS,
    name: str = "fig1",
) -> list[Path]:
    """Draw Figure 1 for all methods in a table.

    Args:
        frame: Rows of ``collect_runs``: one data set, one model, one setting per method (see ``select_best``). What is
            one method says the column ``method``, or ``preconditioner`` where there is none.
        out_dir: Directory of the files, made if missing.
        title: Line above the panels.
        styles: Looks by method, in the order of the legend.
        name: File name without ending.

    Returns:
        Paths of the PNG (200 dpi), the SVG (same table, same bytes) and the CSV (the plotted numbers).

    Raises:
        FigureError: If there are several data sets, models or settings of a method, an unknown method, or no
            training time covered by all finished seeds of a method.
        CollectError: If a method has no run that has ended, or the runs are of several precisions.
    """
    frame = with_names(frame)
    check_uniform(frame, "Figure 1")
    names = method_names(frame, styles)
    require_runs(frame.assign(preconditioner=frame["method"]), names)
    require_one_precision(frame)
    methods = [method_curves(method, frame[frame["method"] == method]) for method in names]
    numbers = _plotted_numbers(methods)
    return write_figure(
        lambda figure: _draw(figure, methods, styles),
        *(numbers, out_dir, name, (PAGE_WIDTH, 3.6), title),
        cautions=seconds_cautions(frame),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw Figure 1 from the best setting per method of all runs below a directory.

    Args:
        arguments: Command line without the program's name; None reads it from the process.

    Returns:
        0, or 2 after a sentence on what is wrong with what it was given.
    """
    parser = argparse.ArgumentParser(prog="python -m kfac_sua.figures.fig1", description="Draw Figure 1.")
    parser.add_argument("root", type=Path, metavar="RUNS_ROOT", help="directory searched for runs, or a campaign's")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="directory of the files")
    parser.add_argument("--title", help="line above the panels (the network and the data set)")
    parser.add_argument("--quiet", action="store_true", help="print no table")
    parser.add_argument(
        "--methods", nargs="+", default=_PAPER_METHODS, metavar="NAME", help="names of preconditioners (the paper's)"
    )
    options = parser.parse_args(arguments)
    try:
        frame = without_comparators(collect_runs(final_runs_root(options.root)))
        require_runs(frame, options.methods)
        candidates = frame[frame["preconditioner"].isin(options.methods)]
        best = select_best(candidates)
        styles = styles_with(options.methods, group_labels(best, candidates))
        paths = draw_figure1(best, options.out, options.title or subject(best), styles)
    except (CollectError, RecordError, FigureError) as error:
        return say(error, BAD_INPUT)
    except OSError as error:
        return say(f"Cannot write the figure to {options.out}: {error.strerror or error}.", BAD_INPUT)
    if not options.quiet:
        settings = candidates["fingerprint"].nunique()
        print(f"Best setting per method, by the lowest mean validation error, of {settings} settings:")
        print(format_table(final_table(best)))
    for caution in seconds_cautions(best):
        say(caution)
    print(f"Wrote {', '.join(map(str, paths))}.")
    return 0


def _plotted_numbers(methods: list[Method]) -> pd.DataFrame:
    """Return one row per plotted point."""
    rows = [
        row
        for method in methods
        for panel, curve in (("train_loss_nats_per_epoch", method.loss), ("val_error_percent_per_s", method.val_error))
        for row in point_rows(curve, {"panel": panel, "method": method.name}, method.setting)
    ]
    columns = ["panel", "method", "x", "mean", "low", "high", "seeds", *methods[0].setting]
    return pd.DataFrame(rows, columns=columns)


def _draw(figure: "Figure", methods: list[Method], styles: Mapping[str, MethodStyle]) -> None:
    """Draw both panels and the legend."""
    loss_axes, error_axes = figure.subplots(1, 2)
    losses = method_lines(methods, [method.loss for method in methods], styles)
    artists = _draw_loss_panel(loss_axes, losses)
    lines = method_lines(methods, [method.val_error for method in methods], styles)
    draw_lines(error_axes, lines)
    limit_errors(error_axes, lines)
    error_axes.set(xlabel="Training time (s)", ylabel="Validation error (%)")
    draw_crosses(error_axes, lines)
    labels = [styles[method.name].label for method in methods]
    if not have_all_finished(methods):
        labels = [f"{label} ({counts_text(method.counts)})" for label, method in zip(labels, methods, strict=True)]
    draw_legend(figure, artists, labels, seeds_title(methods))


def _draw_loss_panel(axes: "Axes", lines: list[Line]) -> "list[Line2D]":
    """Draw the left panel; a logarithmic axis, where the losses span a decade, tells small ones apart."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    artists = draw_lines(axes, lines)
    low, high, _ = extent(lines)
    if low > 0 and high > 10 * low:
        axes.set_yscale("log")
        # Plain numbers at 1, 2 and 5 times the powers of ten, or at these alone if there are many.
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 300 else (1,)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        margin = (high / low) ** 0.04
        axes.set_ylim(low / margin, high * margin)
    else:
        axes.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low) + 1e-9)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.set(xlabel="Epoch", ylabel="Training loss (nats)")
    draw_crosses(axes, lines)
    return artists


if __name__ == "__main__":
    run_command(main)
