"""Horizontal bars, one per method: the axis with their names and the texts at their ends."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from kfac_sua.figures.style import wrapped
from kfac_sua.methods import MethodStyle

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LABEL_WIDTH = 26  # characters
_TEXT_LINE = 0.14  # inches of 8 pt text


def row_height(names: Sequence[str], styles: Mapping[str, MethodStyle], least: float) -> float:
    """Return the inches per bar that keep the names of neighbours apart.

    Args:
        names: Methods with a bar.
        styles: Labels by method.
        least: Inches per bar with names of one line.
    """
    lines = max(wrapped(styles[name].label, _LABEL_WIDTH).count("\n") + 1 for name in names)
    return max(least, _TEXT_LINE * lines + 0.04)


def label_bars(axes: "Axes", names: Sequence[str], styles: Mapping[str, MethodStyle]) -> None:
    """Write the methods' names beside bars at 0, 1, 2, ... from the top.

    Args:
        axes: Where the bars are.
        names: Methods, the first on top.
        styles: Labels by method.
    """
    axes.set_yticks(range(len(names)), [wrapped(styles[name].label, _LABEL_WIDTH) for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)


def write_at_end(axes: "Axes", end: float, position: int, text: str) -> None:
    """Write a text to the right of a bar, in front of grid and reference lines.

    Args:
        axes: Where the bar is.
        end: Where the bar, or its whisker, ends.
        position: Of the bar, from the top.
        text: What to write.
    """
    label = axes.annotate(text, (end, position), (5, 0), textcoords="offset points", va="center", fontsize=8)
    label.set(bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6}, zorder=5)
