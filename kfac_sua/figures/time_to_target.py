"""Epochs and training seconds that each method needs to reach the level of the baseline, as bars."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from kfac_sua.figures.bars import label_bars, row_height, write_at_end
from kfac_sua.figures.curves import FigureError
from kfac_sua.figures.files import PAGE_WIDTH, write_figure
from kfac_sua.figures.panels import method_names, panel_titles
from kfac_sua.figures.style import short_number, wrapped
from kfac_sua.methods import BASELINE, METHODS, MethodStyle
from kfac_sua.runs.comparable import seconds_cautions
from kfac_sua.runs.final_table import require_one_precision

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

UNITS = {"epochs": "Epochs", "seconds": "Training time (s)"}
_TARGETS = ("val_error", "train_loss")


def draw_time_to_target(
    table: pd.DataFrame,
    out_dir: Path,
    styles: Mapping[str, MethodStyle] = METHODS,
    title: str | None = None,
    panels: Sequence[tuple[str, str]] = (),
) -> list[Path]:
    """Draw a row of two bar charts, epochs and seconds, for each panel and target.

    Bars are ordered by method; whiskers are the table's intervals, with an arrow where one is unbounded; the dashed
    line is the baseline's own value. A method that never reaches the target has no bar but the word.

    Args:
        table: Result of ``campaign.targets.target_table``.
        out_dir: Directory of the files, made if missing.
        styles: Looks by method, in the order of the bars.
        title: Line above the panels.
        panels: Names and titles of the panels, in order; empty draws all under their names. One without targets, as its
            baseline did not finish, is left out.

    Returns:
        Paths of the PNG (200 dpi), the SVG (same table, same bytes) and the CSV (the plotted numbers).

    Raises:
        FigureError: If there is no row, no panel named has any, a method has no style, or a method has a target twice.
        CollectError: If the times drawn are of several precisions.
    """
    names = method_names(table, styles)
    titles = panel_titles(table, [pair for pair in panels if pair[0] in set(table["panel"])] or panels)
    if table.duplicated(["panel", "method", "target"]).any():
        raise FigureError("A method has a target twice in one panel; give the table of one campaign.")
    order = {method: position for position, method in enumerate(names)}
    shown = pd.concat([table[table["panel"] == panel] for panel in titles])
    require_one_precision(shown)
    shown = shown.sort_values("method", key=lambda column: column.map(order), kind="stable")
    groups = [
        (panel, target, rows)
        for panel in titles
        for target in _TARGETS
        if len(rows := shown[(shown["panel"] == panel) & (shown["target"] == target)])
    ]
    numbers = pd.concat([rows for _, _, rows in groups], ignore_index=True)
    counts = [len(rows) for _, _, rows in groups]
    height = row_height(names, styles, least=0.24)
    size = (PAGE_WIDTH, 0.3 + 0.3 * bool(title) + sum(0.55 + height * count for count in counts))

    def draw(figure: "Figure") -> None:
        grid = figure.subplots(len(groups), 2, squeeze=False, gridspec_kw={"height_ratios": counts})
        for row, (panel, target, rows) in zip(grid, groups, strict=True):
            heading = _heading(titles[panel] if len(titles) > 1 else "", target, rows["target_value"].iloc[0])
            row[0].set_title(heading, loc="left", fontsize=8.5)
            for axes, unit in zip(row, UNITS, strict=True):
                _draw_bars(axes, rows, unit, styles)
            row[1].set_yticklabels([])
        for axes, label in zip(grid[-1], UNITS.values(), strict=True):
            axes.set_xlabel(label)

    return write_figure(draw, numbers, out_dir, "time_to_target", size, title, cautions=seconds_cautions(shown))


def _heading(panel: str, target: str, value: float) -> str:
    """Return what is reached, after the panel's title where there is one."""
    if target == "val_error":
        text = f"the baseline's lowest validation error, {100 * value:.3g} %"
    else:
        text = f"the baseline's final training loss, {value:.3g} nats"
    return wrapped(f"{panel}: to {text}" if panel else f"To {text}", 85)


def _draw_bars(axes: "Axes", rows: pd.DataFrame, unit: str, styles: Mapping[str, MethodStyle]) -> None:
    """Draw one bar per method, the first on top."""
    values, lows, highs = (rows[column].to_numpy(dtype=float) for column in (unit, f"{unit}_low", f"{unit}_high"))
    names = rows["method"].tolist()
    finite = np.concatenate([values, lows, highs])
    right = 1.42 * max(finite[np.isfinite(finite)], default=1.0) or 1.0  # room for the texts
    reference = values[names.index(BASELINE)] if BASELINE in names else np.nan
    lengths = np.where(np.isfinite(values), values, 0.0)
    for index, name in enumerate(names):
        end, color = lengths[index], styles[name].color
        if np.isfinite(values[index]):  # light, so that the whisker shows on every colour
            axes.barh(index, end, 0.62, color=(color, 0.45), edgecolor=color, linewidth=1.0)
        if np.isfinite(values[index]) and np.isfinite(lows[index]):
            end = max(end, _draw_whisker(axes, index, lows[index], highs[index], right))
        text = _text(values[index], np.nan if name == BASELINE else reference)
        write_at_end(axes, end, index, text)
    if np.isfinite(reference):
        axes.axvline(reference, color="black", linewidth=0.9, linestyle=(0, (4, 2)), zorder=0.9)
    axes.set_xlim(0, right)
    label_bars(axes, names, styles)


def _draw_whisker(axes: "Axes", y: int, low: float, high: float, right: float) -> float:
    """Draw an interval, as an arrow if it is unbounded, and return where it ends."""
    end = high if np.isfinite(high) else 0.7 * right
    axes.plot([low, end], [y, y], color="black", linewidth=1.0, zorder=4)
    axes.plot(low, y, color="black", marker="|", markersize=6, zorder=4)
    axes.plot(end, y, color="black", marker="|" if np.isfinite(high) else ">", markersize=6, zorder=4)
    return end


def _text(value: float, reference: float) -> str:
    """Return a value, with its ratio to the baseline's where there is one."""
    if not np.isfinite(value):
        return "never"
    return f"{short_number(value)} ({value / reference:.2f}×)" if reference > 0 else short_number(value)
