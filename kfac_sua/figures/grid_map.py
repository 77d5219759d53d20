"""The tuning grid of every method as heat maps over learning rate and damping: how sensitive is each?"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from kfac_sua.figures.curves import FigureError
from kfac_sua.figures.files import write_figure
from kfac_sua.figures.grid_layout import CELL_HEIGHT, MARGIN, GridMap, Page, Place, lay_out
from kfac_sua.figures.panels import method_names, panel_titles, with_names
from kfac_sua.figures.style import short_number
from kfac_sua.methods import METHODS, MethodStyle
from kfac_sua.runs.run_info import UNENDED

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

QUANTITIES = {"train_loss": "Training loss of the last epoch (nats)", "val_error_percent": "Best validation error (%)"}
_COLORMAP = "YlGnBu_r"  # its lightness rises steadily, so that it reads the same in grey
_EMPTY: dict[str, Any] = {"facecolor": "white", "edgecolor": "#999999", "linewidth": 0.4}
_DIVERGED = _EMPTY | {"facecolor": "#EEEEEE", "hatch": "//////"}
_LOG_ABOVE = 3.0  # ratio of the highest to the lowest value from which colours follow the logarithm


def draw_grid_map(
    grid: pd.DataFrame,
    out_dir: Path,
    styles: Mapping[str, MethodStyle] = METHODS,
    chosen: Mapping[tuple[str, str], str] | None = None,
    title: str | None = None,
    panels: Sequence[tuple[str, str]] = (),
) -> list[Path]:
    """Draw, per panel, the training loss and the validation error of every cell, a map per method.

    All maps of a panel and quantity share one colour scale, over its finished cells. A cell that diverged is hatched,
    one that was not tried or has not finished is empty, and the chosen one is framed.

    Args:
        grid: Rows of ``collect_runs``, with ``panel`` and ``method`` or without: one run per cell.
        out_dir: Directory of the files, made if missing.
        styles: Labels by method, in the order of the maps.
        chosen: From panel and method to the fingerprint of the chosen cell.
        title: Line above everything.
        panels: Names and titles of the panels, in order; empty draws all under their names.

    Returns:
        Paths of the PNG (200 dpi), the SVG (same table, same bytes) and the CSV (one row per cell).

    Raises:
        FigureError: If a cell has several runs, a method has runs with and without damping, a chosen cell is not in the
            grid, a method has no style, a panel named has no rows, or there is no row.
    """
    grid = with_names(grid)
    names, titles = method_names(grid, styles), panel_titles(grid, panels)
    cells = _cells(grid[grid["panel"].isin(list(titles))], chosen or {}, list(titles), names)
    maps = {panel: _maps(cells[cells["panel"] == panel], names, styles) for panel in titles}
    key = _key(cells)
    untrained = grid[grid["epoch"] == 0].groupby("panel")["train_loss"].max()
    tops = {(str(panel), "train_loss"): float(loss) for panel, loss in untrained.items()}
    page = lay_out(maps, list(QUANTITIES), has_title=title is not None, has_key=bool(key))

    def draw(figure: "Figure") -> None:
        norms = {
            (panel, column): _norm(cells.loc[cells["panel"] == panel, column], tops.get((panel, column), math.inf))
            for panel in titles
            for column in QUANTITIES
        }
        for place in page.panels:
            _write(figure, page, place.left, place.top + 0.2, titles[place.panel], fontsize=10, fontweight="bold")
        for place in page.headers:
            norm = norms[place.panel, place.quantity]
            shown = cells.loc[cells["panel"] == place.panel, place.quantity]
            _draw_header(figure, page, place, norm, is_cut=bool((shown > norm.vmax).any()))
        for place in page.maps:
            _draw_map(figure, page, place, maps[place.panel][place.index], norms[place.panel, place.quantity])
        _draw_key(figure, key)

    return write_figure(draw, cells, out_dir, "grid", (page.width, page.height), title, is_placed=True)


def _cells(
    grid: pd.DataFrame, chosen: Mapping[tuple[str, str], str], panels: list[str], names: list[str]
) -> pd.DataFrame:
    """Return one row per panel, method and run, in the order of the maps; NaN for what did not finish."""
    by_cell = ["panel", "method", "run"]  # panels that have become one configuration share their runs
    last = grid.sort_values("epoch", kind="stable").groupby(by_cell, sort=False).last()
    best = 100 * grid.groupby(by_cell)["val_error"].min()
    is_finished = last["status"] == "finished"
    cells = last[["base_lr", "damping", "status", "fingerprint"]].rename(columns={"base_lr": "lr"})
    cells["train_loss"] = last["train_loss"].where(is_finished)
    cells["val_error_percent"] = best.reindex(last.index).where(is_finished)
    cells = cells.reset_index(["panel", "method"])
    keys = list(zip(cells["panel"], cells["method"], strict=True))
    pairs = zip(keys, cells["fingerprint"], strict=True)
    cells["is_chosen"] = [chosen.get(key) == fingerprint for key, fingerprint in pairs]
    _check_cells(cells, {key: chosen[key] for key in dict.fromkeys(keys) if key in chosen})
    order = {name: position for position, name in enumerate([*panels, *names])}
    cells = cells.sort_values(["lr", "damping"]).sort_values("method", key=lambda c: c.map(order), kind="stable")
    return cells.sort_values("panel", key=lambda column: column.map(order), kind="stable", ignore_index=True)


def _check_cells(cells: pd.DataFrame, chosen: Mapping[tuple[str, str], str]) -> None:
    """Raise unless every cell has one run and every chosen cell is there."""
    twice = cells[cells.duplicated(["panel", "method", "lr", "damping"])]
    if len(twice):
        cell = twice.iloc[0]
        raise FigureError(
            f"Method {cell['method']!r} has several runs with lr {cell['lr']:g} and damping {cell['damping']:g};"
            " a map shows one run per cell, so give one seed and one setting."
        )
    for (panel, method), rows in cells.groupby(["panel", "method"]):
        if rows["damping"].isna().any() and rows["damping"].notna().any():
            raise FigureError(f"Method {method!r} has runs with and without damping; give them different names.")
        if (panel, method) in chosen and not rows["is_chosen"].any():
            raise FigureError(f"The chosen cell of method {method!r} is not in the grid; give the grid it is from.")


def _maps(cells: pd.DataFrame, names: list[str], styles: Mapping[str, MethodStyle]) -> list[GridMap]:
    """Return the maps of one panel."""
    maps = []
    for name in names:
        rows = cells[cells["method"] == name]
        if len(rows):
            lrs, dampings = (tuple(sorted(set(rows[column].dropna()))) for column in ("lr", "damping"))
            maps.append(GridMap(name, styles[name].label, rows, lrs, dampings))
    return maps


def _norm(values: "pd.Series[float]", top: float) -> "Normalize":
    """Return the colour scale of finite values: logarithmic where they span a large ratio.

    Values above ``top``, the untrained network's, share one colour: a loss that exploded would flatten all others.
    """
    from matplotlib.colors import LogNorm, Normalize

    finite = values[np.isfinite(values)]
    if not len(finite):
        return Normalize(0.0, 1.0)
    low, high = float(finite.min()), float(finite.max())
    if low < top < high:
        high = top
    if low > 0 and high > _LOG_ABOVE * low:
        return LogNorm(low, high, clip=True)
    return Normalize(low, high if high > low else low + 1.0, clip=True)


def _draw_header(figure: "Figure", page: Page, place: Place, norm: "Normalize", *, is_cut: bool) -> None:
    """Write what the maps below show, with the colour scale at the right end of the line."""
    _write(figure, page, place.left, place.top + 0.17, QUANTITIES[place.quantity], fontsize=9, fontweight="bold")
    width, height, right = 1.2, 0.1, page.width - MARGIN - 0.42
    axes = _axes(figure, page, right - width, place.top + 0.08, width, height)
    axes.imshow(np.linspace(0, 1, 256)[None], cmap=_COLORMAP, aspect="auto")
    axes.set(xticks=[], yticks=[])
    at_least = "≥ " if is_cut else ""
    for side, x, alignment, mark in ((norm.vmin, -0.04, "right", ""), (norm.vmax, 1.04, "left", at_least)):
        text = mark + short_number(float(side or 0.0))
        axes.text(x, 0.45, text, transform=axes.transAxes, ha=alignment, va="center", fontsize=7.5)


def _draw_map(figure: "Figure", page: Page, place: Place, grid_map: GridMap, norm: "Normalize") -> None:
    """Draw the cells of one method."""
    axes = _axes(figure, page, place.left, place.top, grid_map.width, CELL_HEIGHT * grid_map.num_rows)
    for _, cell in grid_map.cells.iterrows():
        x = grid_map.lrs.index(cell["lr"])
        y = grid_map.dampings.index(cell["damping"]) if grid_map.dampings else 0
        _draw_cell(axes, x, y, cell["status"], cell[place.quantity], norm)
        if cell["is_chosen"]:
            _draw_frame(axes, x, y)
    axes.set(xlim=(0, len(grid_map.lrs)), ylim=(0, grid_map.num_rows))
    axes.set_xticks(np.arange(len(grid_map.lrs)) + 0.5, [f"{lr:g}" for lr in grid_map.lrs])
    axes.set_yticks(np.arange(len(grid_map.dampings)) + 0.5, [f"{damping:g}" for damping in grid_map.dampings])
    axes.tick_params(length=0, pad=2, labelsize=7)
    axes.set_xlabel("Learning rate", fontsize=7.5, labelpad=1)
    if place.has_damping_label:
        axes.set_ylabel("Damping", fontsize=7.5, labelpad=2)
    axes.set_title(grid_map.title, loc="left", fontsize=8.5, pad=3)


def _draw_cell(axes: "Axes", x: int, y: int, status: str, value: float, norm: "Normalize") -> None:
    """Draw one cell: coloured with its value, hatched if diverged, empty if not finished."""
    import matplotlib
    from matplotlib.patches import Rectangle

    look, text, ink, box = _EMPTY, "", "black", None
    if status == "diverged":
        look, text, box = _DIVERGED, "×", {"facecolor": _DIVERGED["facecolor"], "edgecolor": "none", "pad": 0.8}
    elif np.isfinite(value):
        color = matplotlib.colormaps[_COLORMAP](norm(value))
        look, text = _EMPTY | {"facecolor": color}, short_number(value)
        ink = "white" if np.dot(color[:3], (0.299, 0.587, 0.114)) < 0.5 else "black"
    axes.add_patch(Rectangle((x, y), 1, 1, **look))
    axes.text(x + 0.5, y + 0.47, text, ha="center", va="center", fontsize=7, color=ink, bbox=box)


def _draw_frame(axes: "Axes", x: float, y: float) -> None:
    """Draw a black frame with a white rim, which stands out on any colour."""
    from matplotlib.patches import Rectangle

    for color, width, order in (("white", 3.4, 5), ("black", 1.6, 6)):
        frame = Rectangle((x, y), 1, 1, fill=False, edgecolor=color, linewidth=width, zorder=order, clip_on=False)
        axes.add_patch(frame)


def _key(cells: pd.DataFrame) -> list[dict[str, Any]]:
    """Return label and look of what the maps have: frame, hatching, empty cells."""
    entries = {
        "Chosen": (cells["is_chosen"].any(), {"facecolor": "white", "edgecolor": "black", "linewidth": 1.6}),
        "Diverged (×)": ((cells["status"] == "diverged").any(), _DIVERGED),
        "Not finished": (cells["status"].isin(UNENDED).any(), _EMPTY),
    }
    return [{"label": label, **look} for label, (is_used, look) in entries.items() if is_used]


def _draw_key(figure: "Figure", entries: list[dict[str, Any]]) -> None:
    """Explain the cells at the foot of the page."""
    from matplotlib.patches import Patch

    if entries:
        patches = [Patch(**entry) for entry in entries]
        figure.legend(
            handles=patches, loc="lower center", ncols=len(patches), fontsize=8, handlelength=1.6, borderaxespad=0.1
        )


def _axes(figure: "Figure", page: Page, left: float, top: float, width: float, height: float) -> "Axes":
    """Return axes with a place in inches from the upper left corner, without grid and spines."""
    box = (left / page.width, 1 - (top + height) / page.height, width / page.width, height / page.height)
    axes = figure.add_axes(box)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    return axes


def _write(figure: "Figure", page: Page, left: float, base: float, text: str, **font: Any) -> None:
    """Write a line whose baseline lies at a place in inches from the upper left corner."""
    figure.text(left / page.width, 1 - base / page.height, text, **font)
