"""Figure 1 of the paper: training loss per epoch (left) and validation error against training time (right).

Command line: ``python -m kfac_sua.figures.fig1 RUNS_ROOT --out DIR [--title T] [--methods sua kfac]``.

Lines are means over seeds and bands run from the lowest to the highest seed, which with the usual three to
five seeds says more than an estimated standard deviation. Only runs of equal outcome are averaged: a method's
finished seeds, or, if all of its seeds diverged, these, up to their last common finite epoch, which a cross
marks. The legend counts the seeds that diverged or are still running.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from kfac_sua.figures.curves import Curve, FigureError, Method, method_curves
from kfac_sua.figures.style import METHODS, apply_style
from kfac_sua.runs.collect import (
    CollectError,
    collect_runs,
    final_table,
    format_table,
    require_runs,
    select_best,
)
from kfac_sua.runs.record import RecordError

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw_figure1(frame: pd.DataFrame, out_dir: Path, title: str | None = None) -> list[Path]:
    """Draw Figure 1 for all methods in a table.

    Args:
        frame: Rows of ``collect_runs``: one data set, one model, one setting per method (see ``select_best``).
        out_dir: Directory of the files, made if missing.
        title: Line above the panels.

    Returns:
        Paths of fig1.png (200 dpi), fig1.svg (same table, same bytes) and fig1.csv (the plotted numbers).

    Raises:
        FigureError: If there are several data sets, models or settings of a method, an unknown method, or no
            training time covered by all finished seeds of a method.
        CollectError: If a method has no run that has ended.
    """
    _check(frame)
    names = [name for name in METHODS if name in set(frame["preconditioner"])]
    require_runs(frame, names)
    methods = [method_curves(name, frame[frame["preconditioner"] == name]) for name in names]
    out_dir.mkdir(parents=True, exist_ok=True)
    paths = [out_dir / f"fig1.{suffix}" for suffix in ("png", "svg", "csv")]
    _draw(methods, title, paths[:2])
    _plotted_numbers(methods).to_csv(paths[2], index=False)
    return paths


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw Figure 1 from the best setting per method of all runs below a directory.

    Args:
        arguments: Command line without the program's name; None reads it from the process.
    """
    parser = argparse.ArgumentParser(prog="python -m kfac_sua.figures.fig1", description="Draw Figure 1.")
    parser.add_argument("root", type=Path, metavar="RUNS_ROOT", help="directory searched for runs")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="directory of the files")
    parser.add_argument("--title", help="line above the panels")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    options = parser.parse_args(arguments)
    try:
        frame = collect_runs(options.root)
        require_runs(frame, options.methods)
        best = select_best(frame[frame["preconditioner"].isin(options.methods)])
        paths = draw_figure1(best, options.out, options.title)
    except (CollectError, RecordError, FigureError) as error:
        raise SystemExit(str(error)) from error
    except OSError as error:
        raise SystemExit(f"Cannot write the figure to {options.out}: {error.strerror or error}.") from error
    settings = frame.loc[frame["preconditioner"].isin(options.methods), "fingerprint"].nunique()
    print(f"Best setting per method, by the lowest mean validation error, of {settings} settings:")
    print(format_table(final_table(best)))
    print(f"Wrote {', '.join(map(str, paths))}.")


def _check(frame: pd.DataFrame) -> None:
    """Raise unless the table holds one data set, one model and one setting per known method."""
    unknown = sorted(set(frame["preconditioner"]) - METHODS.keys())
    if unknown:
        raise FigureError(f"No style for method {unknown[0]!r}; known are {', '.join(METHODS)}.")
    for column in ("dataset", "model"):
        values = sorted(set(frame[column]))
        if len(values) != 1:
            found = ", ".join(values) or "none"
            raise FigureError(f"Figure 1 needs runs of one {column}, got {found}; give the directory of one.")
    settings = frame.groupby("preconditioner")["fingerprint"].nunique()
    for name in settings.index[settings > 1]:
        count = settings[name]
        raise FigureError(f"Method {name!r} has {count} settings; keep one, for example by select_best.")


def _plotted_numbers(methods: list[Method]) -> pd.DataFrame:
    """Return one row per plotted point."""
    rows = [
        {"panel": panel, "method": method.name, "x": x, "mean": mean, "low": low, "high": high}
        | {"seeds": curve.seeds}
        | method.setting
        for method in methods
        for panel, curve in (("train_loss_nats_per_epoch", method.loss), ("val_error_percent_per_s", method.error))
        for x, mean, low, high in zip(curve.x, curve.mean, curve.low, curve.high, strict=True)
    ]
    columns = ["panel", "method", "x", "mean", "low", "high", "seeds", *methods[0].setting]
    return pd.DataFrame(rows, columns=columns)


def _draw(methods: list[Method], title: str | None, paths: list[Path]) -> None:
    """Draw both panels and save them; matplotlib is imported here because only drawing needs it."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # the reader's own matplotlibrc must not change the figure
        apply_style()
        # Without pyplot: no window, no global state, and PNG is drawn by Agg whatever the backend.
        figure = Figure(figsize=(7.2, 3.6), layout="constrained")
        loss_axes, error_axes = figure.subplots(1, 2)
        _draw_loss_panel(loss_axes, methods)
        _draw_error_panel(error_axes, methods)
        labels, legend_title = _legend_texts(methods)
        columns = 2 if "(" in "".join(labels) else len(labels)
        lines = loss_axes.get_lines()[: len(methods)]
        figure.legend(lines, labels, title=legend_title, loc="outside lower center", ncols=columns)
        if title:
            figure.suptitle(title)
        for path in paths:
            figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def _draw_loss_panel(axes: "Axes", methods: list[Method]) -> None:
    """Draw the left panel; a logarithmic axis, where the losses span a decade, tells small ones apart."""
    from matplotlib.ticker import MaxNLocator

    curves = [method.loss for method in methods]
    _draw_lines(axes, methods, curves)
    low, high, _ = _extent(methods, curves)
    if low > 0 and high > 10 * low:
        axes.set_yscale("log")
        margin = (high / low) ** 0.04
        axes.set_ylim(low / margin, high * margin)
    else:
        axes.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low) + 1e-9)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.set(xlabel="Epoch", ylabel="Training loss (nats)")
    _draw_crosses(axes, methods, curves)


def _draw_error_panel(axes: "Axes", methods: list[Method]) -> None:
    """Draw the right panel; the first epochs may run off its top, as they would flatten all differences."""
    curves = [method.error for method in methods]
    _draw_lines(axes, methods, curves)
    low, high, last = _extent(methods, curves)
    top = min(high, 2 * last)
    margin = 0.05 * max(top - low, 1.0)
    axes.set_ylim(max(0.0, low - margin), top + margin)
    axes.set(xlabel="Training time (s)", ylabel="Validation error (%)")
    _draw_crosses(axes, methods, curves)


def _extent(methods: list[Method], curves: list[Curve]) -> tuple[float, float, float]:
    """Return the lowest, the highest and the highest last value, of finished curves where there are any.

    A loss that explodes before it is non-finite must not flatten the other curves.
    """
    drawn = [(method.has_finished, curve) for method, curve in zip(methods, curves, strict=True) if len(curve.x)]
    chosen = [curve for has_finished, curve in drawn if has_finished] or [curve for _, curve in drawn]
    if not chosen:
        return 0.0, 1.0, 1.0
    return (
        float(min(curve.low.min() for curve in chosen)),
        float(max(curve.high.max() for curve in chosen)),
        float(max(curve.high[-1] for curve in chosen)),
    )


def _draw_lines(axes: "Axes", methods: list[Method], curves: list[Curve]) -> None:
    """Draw a line per method, in order, and a band where it has several seeds."""
    for index, (method, curve) in enumerate(zip(methods, curves, strict=True)):
        style = METHODS[method.name]
        (line,) = axes.plot(curve.x, curve.mean, color=style.color, linestyle=style.linestyle, zorder=3)
        # At even distances along the line, and shifted per method so that markers do not cover each other.
        line.set(marker=style.marker, markevery=None if len(curve.x) <= 10 else (0.03 * index, 0.15))
        if curve.seeds > 1:
            axes.fill_between(curve.x, curve.low, curve.high, color=style.color, alpha=0.15, linewidth=0)
    axes.set_xlim(left=0)


def _draw_crosses(axes: "Axes", methods: list[Method], curves: list[Curve]) -> None:
    """Mark where a method without a finished run ends, at the panel's edge if the value is beyond it."""
    for method, curve in zip(methods, curves, strict=True):
        if not method.has_finished and len(curve.x):
            y = np.clip(curve.mean[-1], *axes.get_ylim())
            color = METHODS[method.name].color
            axes.plot(curve.x[-1], y, color=color, marker="X", markersize=8, zorder=4, clip_on=False)


def _legend_texts(methods: list[Method]) -> tuple[list[str], str]:
    """Return the label of each method and the legend's title, which names the seeds if all methods agree."""
    labels = [METHODS[method.name].label for method in methods]
    seeds = methods[0].counts.get("finished", 0)
    if all(method.counts == {"finished": seeds} for method in methods):
        return labels, "One seed per method" if seeds == 1 else f"Mean and range of {seeds} seeds"
    notes = [", ".join(f"{count} {status}" for status, count in method.counts.items()) for method in methods]
    texts = [f"{label} ({note})" for label, note in zip(labels, notes, strict=True)]
    crosses = "" if all(method.has_finished for method in methods) else "; a cross marks divergence"
    return texts, f"Mean and range of finished seeds{crosses}"


if __name__ == "__main__":
    main()
