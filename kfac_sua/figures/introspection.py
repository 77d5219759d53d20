"""Figure of the introspection: what each approximation's direction is worth, and how far its block is from the Fisher.

A column per Fisher. From the top: the share of the attainable decrease over the checkpoints, and over the damping at
the last one, both of all layers against the exact Fisher over all of them; that share against Frobenius' error, and the
parts of that error, both block by block.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from kfac_sua.figures.curves import FigureError
from kfac_sua.figures.files import PAGE_WIDTH, write_figure
from kfac_sua.figures.lines import draw_legend
from kfac_sua.figures.panels import method_names
from kfac_sua.figures.style import short_number
from kfac_sua.methods import MethodStyle

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FISHERS = {"empirical": "Empirical Fisher", "mc": "Fisher by sampled labels", "exact": "Exact Fisher"}
_LIGHT, _DARK = 0.35, 1.0  # opacities of the two parts of an error
_EXACT = ("exact", "whole")
_LARGE = 1.25  # an error beyond which the others would be hard to tell apart; K = 0 has one of 1


def draw_introspection(
    frame: pd.DataFrame,
    out_dir: Path,
    damping: float,
    styles: Mapping[str, MethodStyle],
    title: str | None = None,
    name: str = "introspect",
) -> list[Path]:
    """Draw what was measured.

    Args:
        frame: The table of the measurements, as in introspect.csv; checkpoints in the order of training.
        out_dir: Directory of the files, made if missing.
        damping: ε of the panels that show one.
        styles: Looks by method, in the order of the legend.
        title: Line above the panels.
        name: File name without ending.

    Returns:
        Paths of the PNG (200 dpi), the SVG (same table, same bytes) and the CSV (the table).

    Raises:
        FigureError: If there is nothing to draw, or nothing at the damping.
    """
    names = method_names(frame, styles)
    if not (frame["damping"] == damping).any():
        raise FigureError(f"Nothing was measured at damping {damping:g}.")
    fishers = [fisher for fisher in FISHERS if (frame["fisher"] == fisher).any()]
    checkpoints = list(dict.fromkeys(frame["checkpoint"]))
    drawn = [method for method in names if method != "whole"]  # which is 1 by definition
    bars = 0.45 + 0.17 * len(drawn)
    heights = (1.9, 1.9, 2.0, bars)

    def draw(figure: "Figure") -> None:
        grid = figure.subplots(len(heights), len(fishers), squeeze=False, height_ratios=heights)
        for column, fisher in enumerate(fishers):
            rows = frame[frame["fisher"] == fisher]
            at_end = rows[rows["checkpoint"] == checkpoints[-1]]
            panels: list[Axes] = [axes[column] for axes in grid]
            panels[0].set_title(FISHERS[fisher], loc="left")
            network = rows[(rows["scope"] == "network") & (rows["statistics"] == "same")]
            _draw_lines(panels[0], network[network["damping"] == damping], "checkpoint", checkpoints, drawn, styles)
            of_end = network[network["checkpoint"] == checkpoints[-1]]
            _draw_lines(panels[1], of_end, "damping", sorted(set(rows["damping"])), drawn, styles)
            blocks = at_end[(at_end["scope"] == "blocks") & (at_end["damping"] == damping)]
            _draw_scatter(panels[2], blocks, drawn, styles)
            _draw_errors(panels[3], blocks[blocks["statistics"] == "same"], drawn, styles, has_names=column == 0)
            panels[0].set_xlabel(f"Checkpoint (ε = {damping:g})")
            panels[1].set_xlabel(f"Damping ε ({checkpoints[-1]})")
            panels[2].set_xlabel(f"Frobenius error ({checkpoints[-1]}, ε = {damping:g})")
            panels[3].set_xlabel("Squared error: basis, then eigenvalues")
        for row in grid[:2]:
            row[0].set_ylabel("Share, all layers")
        grid[2][0].set_ylabel("Share, block by block")
        _draw_legend(figure, drawn, styles, seeds=frame["seed"].nunique())

    return write_figure(draw, frame, out_dir, name, (PAGE_WIDTH, 1.7 + 0.3 * bool(title) + sum(heights)), title)


def _draw_lines(
    axes: "Axes",
    rows: pd.DataFrame,
    column: str,
    values: Sequence[object],
    names: Sequence[str],
    styles: Mapping[str, MethodStyle],
) -> None:
    """Draw the share of every method over checkpoints or dampings, a band from the lowest to the highest seed."""
    for name in names:
        style = styles[name]
        shares = rows[rows["method"] == name].groupby(column)["share"].agg(["mean", "min", "max", "size"])
        shares = shares.reindex([value for value in values if value in shares.index])
        positions = [values.index(value) for value in shares.index]
        (line,) = axes.plot(positions, shares["mean"], color=style.color, linestyle=style.linestyle)
        line.set(marker=style.marker, zorder=3)
        if (shares["size"] > 1).any():
            axes.fill_between(positions, shares["min"], shares["max"], color=style.color, alpha=0.15, linewidth=0)
    texts = [f"{value:g}" if isinstance(value, float) else str(value) for value in values]
    axes.set_xticks(range(len(values)), texts)
    axes.set_xlim(-0.25, len(values) - 0.75)
    axes.set_ylim(0, 1.02)


def _draw_scatter(axes: "Axes", rows: pd.DataFrame, names: Sequence[str], styles: Mapping[str, MethodStyle]) -> None:
    """Draw error and share of every seed: empty markers for statistics of other images, large errors at the edge."""
    for name in names:
        style = styles[name]
        for statistics, face in (("same", style.color), ("other", "white")):
            own = rows[(rows["method"] == name) & (rows["statistics"] == statistics)]
            if name in _EXACT and statistics == "same":
                continue  # an error of 0 and a share of 1 by definition
            axes.plot(
                own["relative_error"].clip(upper=_LARGE),
                own["share"],
                linestyle="none",
                color=style.color,
                marker=style.marker,
                markerfacecolor=face,
                zorder=3,
            )
        largest = rows.loc[rows["method"] == name, ["relative_error", "share"]].max()
        if largest["relative_error"] > _LARGE:  # of a structure whose scale is not that of F
            told = f"{short_number(largest['relative_error'])} →"
            axes.text(_LARGE, largest["share"] + 0.03, told, ha="right", va="bottom", color=style.color)
    axes.set_ylim(bottom=0)


def _draw_errors(
    axes: "Axes", rows: pd.DataFrame, names: Sequence[str], styles: Mapping[str, MethodStyle], *, has_names: bool
) -> None:
    """Draw the squares of the error's two parts, which add up, as bars side by side; large ones end at the edge."""
    names = [name for name in names if name not in _EXACT]
    squares = rows.assign(basis=rows["basis_error"] ** 2, eigenvalues=rows["eigenvalue_error"] ** 2)
    means = squares.groupby("method")[["basis", "eigenvalues"]].mean()
    for position, name in enumerate(names):
        basis, eigenvalues = float(means["basis"][name]), float(means["eigenvalues"][name])
        color = styles[name].color
        axes.barh(position, basis, color=color, alpha=_DARK, height=0.7)
        axes.barh(position, eigenvalues, left=basis, color=color, alpha=_LIGHT, height=0.7)
        if basis + eigenvalues > _LARGE:
            axes.text(_LARGE, position, f"{short_number(basis + eigenvalues)} → ", ha="right", va="center")
    axes.set_yticks(range(len(names)), [styles[name].label if has_names else "" for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    if (means.sum(axis=1) > _LARGE).any():
        axes.set_xlim(0, _LARGE)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)


def _draw_legend(figure: "Figure", names: Sequence[str], styles: Mapping[str, MethodStyle], seeds: int) -> None:
    from matplotlib.lines import Line2D

    lines = []
    for name in names:
        line = Line2D([], [], color=styles[name].color, marker=styles[name].marker)
        line.set(linestyle=styles[name].linestyle)
        lines.append(line)
    labels = [styles[name].label for name in names]
    lines.append(Line2D([], [], color="#555555", marker="o", linestyle="none", markerfacecolor="white"))
    labels.append("Empty: statistics of other images")
    title = "One seed" if seeds == 1 else f"Mean and range of {seeds} seeds"
    draw_legend(figure, lines, labels, title)
