"""Curves with bands over seeds, and the legend below them, for Figures 1 and 2."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from kfac_sua.figures.curves import Curve, Method
from kfac_sua.figures.style import wrapped
from kfac_sua.methods import Dashes, MethodStyle

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from numpy.typing import NDArray

_MARKER_SPACING = 0.07  # of the longest line's extent along x


@dataclasses.dataclass(frozen=True)
class Line:
    """A curve and its look.

    Attributes:
        curve: The plotted numbers.
        style: The method's look.
        linestyle: Replaces the style's where dashes have another meaning.
        is_open: Whether the markers are empty.
        has_finished: Whether the runs finished; if not, a cross marks the end.
    """

    curve: Curve
    style: MethodStyle
    linestyle: Dashes
    is_open: bool
    has_finished: bool


def method_lines(methods: Sequence[Method], curves: Sequence[Curve], styles: Mapping[str, MethodStyle]) -> list[Line]:
    """Return one line per method in its own look.

    Args:
        methods: What is drawn.
        curves: Their curves of one quantity.
        styles: Looks by method.
    """
    return [
        Line(curve, styles[method.name], styles[method.name].linestyle, False, method.has_finished)
        for method, curve in zip(methods, curves, strict=True)
    ]


def draw_lines(axes: "Axes", lines: Sequence[Line]) -> "list[Line2D]":
    """Draw lines in order, each with a band from the lowest to the highest seed where there are several.

    Args:
        axes: Where to draw; its x axis will start at 0.
        lines: What to draw.

    Returns:
        The artist of each line.
    """
    extent = max((line.curve.x[-1] for line in lines if len(line.curve.x)), default=1.0)
    artists = []
    for index, line in enumerate(lines):
        curve, color = line.curve, line.style.color
        (artist,) = axes.plot(curve.x, curve.mean, color=color, linestyle=line.linestyle, zorder=3)
        marked = _marked_points(curve.x, _MARKER_SPACING * extent, shift=index / len(lines))
        artist.set(marker=line.style.marker, markevery=marked)
        if line.is_open:
            artist.set_markerfacecolor("white")
        if curve.seeds > 1:
            axes.fill_between(curve.x, curve.low, curve.high, color=color, alpha=0.15, linewidth=0)
        artists.append(artist)
    axes.set_xlim(left=0)
    return artists


def draw_crosses(axes: "Axes", lines: Sequence[Line]) -> None:
    """Mark where lines without a finished run end, at the panel's edge if the value is beyond it.

    Args:
        axes: Where to draw, with its final y limits.
        lines: The lines that were drawn.
    """
    for line in lines:
        if not line.has_finished and len(line.curve.x):
            y = np.clip(line.curve.mean[-1], *axes.get_ylim())
            x = line.curve.x[-1]
            axes.plot(x, y, color=line.style.color, marker="X", markersize=8, zorder=4, clip_on=False)


def extent(lines: Sequence[Line]) -> tuple[float, float, float]:
    """Return the lowest, the highest and the highest last value, of finished curves where there are any.

    A loss that explodes before it is non-finite must not flatten the other curves.

    Args:
        lines: Lines of one panel, some perhaps without points.
    """
    drawn = [line for line in lines if len(line.curve.x)]
    chosen = [line.curve for line in drawn if line.has_finished] or [line.curve for line in drawn]
    if not chosen:
        return 0.0, 1.0, 1.0
    return (
        float(min(curve.low.min() for curve in chosen)),
        float(max(curve.high.max() for curve in chosen)),
        float(max(curve.high[-1] for curve in chosen)),
    )


def limit_errors(axes: "Axes", lines: Sequence[Line]) -> None:
    """Set the y limits for errors; the first epochs may run off the top, as they would flatten all differences.

    Args:
        axes: Where the lines were drawn.
        lines: Errors in percent.
    """
    low, high, last = extent(lines)
    top = min(high, 2 * last) if last > 0 else high
    margin = 0.05 * max(top - low, 1.0)
    axes.set_ylim(max(0.0, low - margin), top + margin)


def draw_legend(figure: "Figure", handles: "Sequence[Line2D]", labels: Sequence[str], title: str) -> None:
    """Draw a legend below all panels, in as many columns as fit.

    Args:
        figure: The figure, whose width limits the columns.
        handles: Artists of the entries.
        labels: Their texts, broken into lines where one is wider than the figure.
        title: Line above the entries.
    """
    width = figure.get_figwidth()
    texts = [wrapped(label, int((width - 0.7) / 0.072)) for label in labels]
    columns = legend_columns(texts, width)
    figure.legend(handles, texts, title=title, loc="outside lower center", ncols=columns)


def legend_columns(labels: Sequence[str], width: float) -> int:
    """Return how many columns of legend entries fit side by side.

    Estimated from the number of characters, so that the layout does not depend on the font.

    Args:
        labels: Texts of the entries, filled column by column.
        width: Inches that the legend may take.
    """
    lengths = [max(map(len, label.splitlines()), default=0) for label in labels]
    for rows in range(1, len(labels)):
        columns = -(-len(labels) // rows)  # the fewest that need no more rows
        widest = [max(column) for column in np.array_split(lengths, columns)]
        if sum(0.62 + 0.069 * length for length in widest) <= width:
            return columns
    return 1


def seeds_title(methods: Sequence[Method]) -> str:
    """Return the legend's title, which names the seeds if all methods agree.

    Args:
        methods: What is drawn in all panels.
    """
    if have_all_finished(methods):
        seeds = methods[0].counts["finished"]
        return "One seed per method" if seeds == 1 else f"Mean and range of {seeds} seeds"
    crosses = "" if all(method.has_finished for method in methods) else "; a cross marks divergence"
    return f"Mean and range of finished seeds{crosses}"


def have_all_finished(methods: Sequence[Method]) -> bool:
    """Return whether all runs finished, and every method has as many.

    Args:
        methods: What is drawn in all panels.
    """
    return all(method.counts == {"finished": methods[0].counts.get("finished")} for method in methods)


def counts_text(counts: Mapping[str, int]) -> str:
    """Return how many runs ended how, such as ``2 finished, 1 diverged``.

    Args:
        counts: Number of runs by status.
    """
    return ", ".join(f"{count} {status}" for status, count in counts.items())


def point_rows(curve: Curve, shared: Mapping[str, object], setting: Mapping[str, object]) -> list[dict[str, object]]:
    """Return one row of the CSV per plotted point.

    Args:
        curve: The plotted numbers.
        shared: Columns before them, the same for all points.
        setting: Columns after them, likewise.
    """
    points = zip(curve.x, curve.mean, curve.low, curve.high, strict=True)
    return [
        {**shared, "x": x, "mean": mean, "low": low, "high": high, "seeds": curve.seeds, **setting}
        for x, mean, low, high in points
    ]


def _marked_points(x: "NDArray[np.float64]", spacing: float, shift: float) -> list[int]:
    """Return the points that get a marker: all that are at least ``spacing`` apart, the first included.

    Where points are denser, lines start at different fractions ``shift`` of the spacing, so that markers of methods
    with the same x do not cover each other.
    """
    is_dense = len(x) > 1 and np.diff(x).max() < spacing
    marked: list[int] = []
    earliest = x[0] + shift * spacing if is_dense else -np.inf
    for index, position in enumerate(x):
        if position >= earliest:
            marked.append(index)
            earliest = position + spacing
    return marked
