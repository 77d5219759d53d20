"""Seconds of a refresh and of an application against the size of a layer, one panel per sweep.

Command line: ``python -m kfac_sua.figures.scaling SCALING_CSV --out DIR [--title T]`` draws a table of
``python -m kfac_sua.bench.scaling`` again.

Colours and markers are the methods' own; filled markers on solid lines are a refresh (statistics and inversion), empty
ones on dashed lines the application at every mini-batch. Thin lines show inverses of low rank where they were used.
"""

if __name__ == "__main__":  # before the imports that take seconds
    from kfac_sua.startup import begin

    begin()

import argparse
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from kfac_sua.command_line import BAD_INPUT, say
from kfac_sua.figures.curves import FigureError
from kfac_sua.figures.files import PAGE_WIDTH, write_figure
from kfac_sua.figures.lines import draw_legend
from kfac_sua.figures.panels import method_names, panel_titles
from kfac_sua.files.openers import cannot_use, read_regular
from kfac_sua.methods import BASELINE, METHODS, MethodStyle
from kfac_sua.startup import run_command

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Sweep -> (title, label of the x axis), in the order of the panels.
PANELS = {
    "width": ("Width", "Channels"),
    "kernel": ("Kernel size", "Kernel height and width (pixels)"),
    "group": ("Group size", "Channels per group"),
    "batch": ("Mini-batch", "Examples"),
}
# Column -> what it is in a title, where it does not vary.
_FIXED = {
    "channels": "{0} channels",
    "kernel_size": "{0}×{0}",
    "batch_size": "mini-batch {0}",
    "group_size": "groups of {0}",
}
_COLUMNS = ("sweep", "size", *_FIXED, "method", "inverse_method", "is_low_rank", "cost", "seconds", "note")
_REFRESH = ("statistics", "inversion")
_DASHED = (0, (4, 1.5))
_DOTTED = (0, (1, 1.5))


def draw_scaling(
    frame: pd.DataFrame,
    out_dir: Path,
    title: str | None = None,
    styles: Mapping[str, MethodStyle] = METHODS,
    name: str = "scaling",
) -> list[Path]:
    """Draw one panel per sweep, sizes on a binary and seconds on a decimal logarithmic axis.

    Args:
        frame: A row per sweep, size, method, way of inverting and cost, as in scaling.csv; seconds are medians.
        out_dir: Directory of the files, made if missing.
        title: Line above the panels.
        styles: Looks by method, in the order of the legend.
        name: File name without ending.

    Returns:
        Paths of the PNG (200 dpi), the SVG (same table, same bytes) and the CSV (the table).

    Raises:
        FigureError: If a column is missing, nothing was measured, or there is an unknown method or sweep.
    """
    _check(frame)
    measured = frame[frame["note"] == ""]
    names = method_names(measured, styles)
    panels = _panel_titles(measured)
    size = (PAGE_WIDTH, 1.0 + 0.3 * bool(title) + 2.5 * -(-len(panels) // 2))

    def draw(figure: "Figure") -> None:
        columns = min(2, len(panels))
        grid = list(figure.subplots(-(-len(panels) // columns), columns, squeeze=False).flat)
        for position, (axes, panel) in enumerate(zip(grid, panels, strict=False)):
            _draw_panel(axes, measured[measured["sweep"] == panel], names, styles)
            axes.set_title(panels[panel], loc="left", fontsize=8.5)
            axes.set(xlabel=PANELS[panel][1], ylabel="Seconds" if position % columns == 0 else "")
        for axes in grid[len(panels) :]:
            axes.remove()
        _draw_legend(figure, names, styles, measured, num_left_out=_num_cases(frame) - _num_cases(measured))

    return write_figure(draw, frame, out_dir, name, size, title)


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw a table of measurements.

    Args:
        arguments: Command line without the program's name; None reads it from the process.

    Returns:
        0, or 2 after a sentence on what is wrong with what it was given.
    """
    parser = argparse.ArgumentParser(prog="python -m kfac_sua.figures.scaling", description="Draw the scaling study.")
    parser.add_argument("table", type=Path, metavar="SCALING_CSV", help="table of python -m kfac_sua.bench.scaling")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="directory of the files")
    parser.add_argument("--title", help="line above the panels")
    options = parser.parse_args(arguments)
    try:
        paths = draw_scaling(_read(options.table), options.out, options.title)
    except FigureError as error:
        return say(error, BAD_INPUT)
    except OSError as error:
        return say(cannot_use(error, options.out), BAD_INPUT)
    print(f"Wrote {', '.join(map(str, paths))}.")
    return 0


def _read(path: Path) -> pd.DataFrame:
    try:
        frame = pd.read_csv(io.BytesIO(read_regular(path)), dtype={"group_size": "Int64", "note": "str"})
    except ValueError as error:  # pandas' own errors are ValueErrors
        reason = " ".join(str(error).split())
        raise FigureError(f"{path} is not a table ({reason}); give a scaling.csv.") from error
    return frame.fillna({"note": ""}) if "note" in frame else frame


def _check(frame: pd.DataFrame) -> None:
    missing = [column for column in _COLUMNS if column not in frame]
    if missing:
        raise FigureError(f"The table lacks the column {missing[0]!r}; give a scaling.csv.")
    unknown = sorted(set(frame["sweep"]) - PANELS.keys())
    if unknown:
        raise FigureError(f"There is no panel for sweep {unknown[0]!r}; known are {', '.join(PANELS)}.")


def _panel_titles(measured: pd.DataFrame) -> dict[str, str]:
    """Return the title of every sweep measured, with what is the same at all its sizes."""
    titles = []
    for sweep, (title, _) in PANELS.items():
        rows = measured[measured["sweep"] == sweep]
        uniform = {column: set(rows[column].dropna()) for column in _FIXED if not rows[column].equals(rows["size"])}
        fixed = [_FIXED[column].format(*values) for column, values in uniform.items() if len(values) == 1]
        if len(rows):
            titles.append((sweep, f"{title}\n{', '.join(fixed)}"))
    return panel_titles(measured.assign(panel=measured["sweep"]), titles)


def _num_cases(frame: pd.DataFrame) -> int:
    return len(frame.drop_duplicates([*_FIXED, "method", "inverse_method"]))


def _draw_panel(axes: "Axes", rows: pd.DataFrame, names: Sequence[str], styles: Mapping[str, MethodStyle]) -> None:
    from matplotlib.ticker import NullLocator

    own = rows[rows["cost"] == "forward_backward"].groupby("size")["seconds"].median()
    axes.plot(own.index, own, color=styles[BASELINE].color, linestyle=_DOTTED, zorder=2)
    for name in names:
        of_method = rows[rows["method"] == name]
        _draw_method(axes, of_method[of_method["inverse_method"] == "cholesky"], styles[name], is_thin=False)
        of_low_rank = of_method[(of_method["inverse_method"] == "auto") & of_method["is_low_rank"]]
        _draw_method(axes, of_low_rank, styles[name], is_thin=True)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    sizes = sorted(set(rows["size"]))
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.xaxis.set_minor_locator(NullLocator())


def _draw_method(axes: "Axes", rows: pd.DataFrame, style: MethodStyle, *, is_thin: bool) -> None:
    """Draw a refresh and an application of one method, inverted in one way."""
    table = rows.pivot(index="size", columns="cost", values="seconds").reindex(columns=[*_REFRESH, "application"])
    lines = ((table[list(_REFRESH)].sum(axis=1, min_count=2), "-"), (table["application"], _DASHED))
    for seconds, linestyle in lines:
        (line,) = axes.plot(seconds.index, seconds, color=style.color, linestyle=linestyle, marker=style.marker)
        line.set_markerfacecolor(style.color if linestyle == "-" else "white")
        line.set_zorder(3)
        if is_thin:
            line.set(linewidth=0.7, markersize=2.5)


def _draw_legend(
    figure: "Figure",
    names: Sequence[str],
    styles: Mapping[str, MethodStyle],
    measured: pd.DataFrame,
    num_left_out: int,
) -> None:
    """Draw what colours, dashes and widths mean, below all panels."""
    from matplotlib.lines import Line2D

    entries: list[tuple[Line2D, str]] = []
    for name in names:
        style = styles[name]
        entries.append((Line2D([], [], color=style.color, marker=style.marker, linestyle="none"), style.label))
    entries.append((Line2D([], [], color="#555555", marker="o"), "Refresh: statistics, inversion"))
    applied = Line2D([], [], color="#555555", marker="o", linestyle=_DASHED, markerfacecolor="white")
    entries.append((applied, "Application"))
    if (measured["is_low_rank"] & (measured["inverse_method"] == "auto")).any():
        thin = Line2D([], [], color="#555555", marker="o", linewidth=0.7, markersize=2.5)
        entries.append((thin, "Thin: inverses of low rank"))
    own = Line2D([], [], color=styles[BASELINE].color, linestyle=_DOTTED)
    entries.append((own, "The layer's forward and backward"))
    title = f"{num_left_out} cases not measured for lack of memory" if num_left_out else ""
    draw_legend(figure, [line for line, _ in entries], [label for _, label in entries], title)


if __name__ == "__main__":
    run_command(main)
