"""Where the time goes: training seconds per epoch by phase, one bar per method."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from kfac_sua.figures.bars import label_bars, row_height, write_at_end
from kfac_sua.figures.files import PAGE_WIDTH, write_figure
from kfac_sua.figures.lines import legend_columns
from kfac_sua.figures.panels import method_names, panel_titles, with_names
from kfac_sua.figures.style import short_number
from kfac_sua.methods import BASELINE, METHODS, MethodStyle
from kfac_sua.runs.comparable import seconds_cautions
from kfac_sua.runs.final_table import require_one_precision

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Phase -> (legend, colour, hatching). Lightness and hatching distinguish them in grey.
PHASES = {
    "forward_backward": ("Forward and backward", "#D9D9D9", ""),
    "statistics": ("Statistics", "#56B4E9", "////"),
    "inversion": ("Inversion", "#332288", ""),
    "application": ("Application", "#EE9A3A", "...."),
    "optimizer": ("Optimizer", "#777777", ""),
    "data": ("Mini-batches", "#F0E442", "\\\\\\\\"),
    "captured": ("Captured steps", "#7BCFB0", "----"),
    "other": ("Other", "#FFFFFF", "xxxx"),
}
_NEGLIGIBLE = 1e-3  # share of an epoch; less is rounding and the cost of the clock itself


def draw_time_split(
    finals: pd.DataFrame,
    out_dir: Path,
    styles: Mapping[str, MethodStyle] = METHODS,
    name: str = "time_split",
    title: str | None = None,
    panels: Sequence[tuple[str, str]] = (),
) -> list[Path]:
    """Draw stacked bars of the seconds per epoch.

    A captured step has no parts of its own, as the device carries out forward and backward pass, application and
    optimizer as one graph. All of it is in ``captured``, and the parts are those of the other steps alone, such as
    those with statistics: of methods whose steps are captured, compare totals, statistics and inversion.

    Args:
        finals: Rows of ``collect_runs``, with ``panel`` and ``method`` or without; the finished runs are drawn.
        out_dir: Directory of the files, made if missing.
        styles: Labels by method, in the order of the bars.
        name: File name without ending.
        title: Line above the panels.
        panels: Names and titles of the panels, in order; empty draws all under their names.

    Returns:
        Paths of the PNG (200 dpi), the SVG (same table, same bytes) and the CSV: per panel, method and phase the mean
        over seeds; phase ``other`` is what is in ``train_time_s`` but in no phase, zero where rounding makes it
        negligible or negative, ``total`` all of it.

    Raises:
        FigureError: If a method has no style, a panel named has no rows, or there is no row.
        CollectError: If the runs drawn are of several precisions.
    """
    frame = with_names(finals)
    names, titles = method_names(frame, styles), panel_titles(frame, panels)
    frame = frame[frame["panel"].isin(list(titles))]
    require_one_precision(frame)
    numbers = _seconds_per_epoch(frame, names, list(titles))
    counts = [numbers.loc[numbers["panel"] == panel, "method"].nunique() for panel in titles]
    height = row_height(names, styles, least=0.3)
    size = (PAGE_WIDTH, 0.75 + 0.4 * bool(title) + sum(0.4 + height * count for count in counts))

    def draw(figure: "Figure") -> None:
        grid = figure.subplots(len(titles), 1, squeeze=False, gridspec_kw={"height_ratios": counts})[:, 0]
        for axes, panel in zip(grid, titles, strict=True):
            _draw_bars(axes, numbers[numbers["panel"] == panel], styles)
            if len(titles) > 1:
                axes.set_title(titles[panel], loc="left")
        grid[-1].set_xlabel("Training time per epoch (s)")
        _draw_legend(figure, numbers)

    return write_figure(draw, numbers, out_dir, name, size, title, cautions=seconds_cautions(frame))


def _seconds_per_epoch(frame: pd.DataFrame, names: list[str], panels: list[str]) -> pd.DataFrame:
    """Return the columns panel, method, phase, seconds_per_epoch (NaN without a finished run), ratio and seeds."""
    rows = []
    for panel in panels:
        inside = frame[frame["panel"] == panel]
        means = {name: _mean_split(inside[inside["method"] == name]) for name in names if name in set(inside["method"])}
        reference = means[BASELINE][0]["total"] if BASELINE in means else np.nan
        for name, (split, seeds) in means.items():
            for phase, seconds in split.items():
                ratio = seconds / reference if phase == "total" else np.nan
                rows.append((panel, name, phase, seconds, ratio, seeds))
    return pd.DataFrame(rows, columns=["panel", "method", "phase", "seconds_per_epoch", "ratio_to_baseline", "seeds"])


def _mean_split(runs: pd.DataFrame) -> tuple[dict[str, float], int]:
    """Return the mean over finished runs of the seconds per epoch by phase, and the number of these runs."""
    finished = runs[(runs["status"] == "finished") & (runs["epoch"] > 0)]
    last = finished.sort_values("epoch").groupby("run").last()
    measured = [phase for phase in PHASES if phase != "other"]
    # Tables from before data_s was measured have it within forward_backward_s. captured_s was added later still.
    split = {phase: float((last.get(f"{phase}_s", 0.0 * last["epoch"]) / last["epoch"]).mean()) for phase in measured}
    total = float((last["train_time_s"] / last["epoch"]).mean())
    other = total - sum(split.values())
    return split | {"other": other if other > _NEGLIGIBLE * total else 0.0, "total": total}, len(last)


def _draw_bars(axes: "Axes", numbers: pd.DataFrame, styles: Mapping[str, MethodStyle]) -> None:
    """Draw one bar per method, the first on top, with its total and the ratio to the baseline's."""
    names = list(dict.fromkeys(numbers["method"]))
    table = numbers.pivot(index="method", columns="phase", values="seconds_per_epoch").loc[names]
    ends = np.zeros(len(names))
    for phase, (_, color, hatch) in PHASES.items():
        widths = table[phase].fillna(0.0).to_numpy(dtype=float)
        bars = axes.barh(range(len(names)), widths, 0.66, left=ends, color=color, hatch=hatch)
        for bar in bars:
            bar.set(edgecolor="black", linewidth=0.5 if bar.get_width() else 0.0)
        ends = ends + widths
    ratios = numbers[numbers["phase"] == "total"].set_index("method")["ratio_to_baseline"]
    for index, name in enumerate(names):
        text = _total_text(table.loc[name, "total"], ratios[name], name)
        write_at_end(axes, ends[index], index, text)
    axes.set_xlim(0, 1.22 * ends.max() or 1.0)  # room for the texts
    label_bars(axes, names, styles)


def _total_text(total: float, ratio: float, name: str) -> str:
    """Return the total, with its ratio to the baseline's for another method."""
    if np.isnan(total):
        return "no finished run"
    note = "" if name == BASELINE or np.isnan(ratio) else f" ({ratio:.2f}×)"
    return f"{short_number(total)} s{note}"


def _draw_legend(figure: "Figure", numbers: pd.DataFrame) -> None:
    """Draw the phases that have any time, below all panels."""
    from matplotlib.patches import Patch

    is_used = numbers.groupby("phase")["seconds_per_epoch"].max() > 0
    patches = [
        Patch(facecolor=color, edgecolor="black", linewidth=0.5, hatch=hatch, label=label)
        for phase, (label, color, hatch) in PHASES.items()
        if is_used[phase]
    ]
    if patches:
        columns = legend_columns([label for phase, (label, _, _) in PHASES.items() if is_used[phase]], PAGE_WIDTH)
        figure.legend(handles=patches, loc="outside lower center", ncols=columns, handlelength=2.2)
