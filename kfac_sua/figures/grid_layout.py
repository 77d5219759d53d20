"""Where the maps of a grid stand on the page, in inches: side by side if they fit, with cells large enough to read."""

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np
import pandas as pd

from kfac_sua.figures.files import PAGE_WIDTH
from kfac_sua.figures.style import wrapped

MARGIN = 0.08
CELL_HEIGHT = 0.225
_CHARACTER = 0.055  # inches per character of 7 pt text
_TITLE_LINE, _BELOW, _GAP = 0.16, 0.36, 0.08
_HEADER, _PANEL_HEADER, _FIGURE_TITLE, _KEY = 0.28, 0.3, 0.36, 0.28
_DAMPING_LABEL = 0.15


@dataclasses.dataclass(frozen=True)
class GridMap:
    """The cells of one method in one panel.

    Attributes:
        method: Name of the method.
        label: Title of the map.
        cells: One row per run of the grid.
        lrs: Learning rates, ascending.
        dampings: Dampings, ascending; empty for a method without.
    """

    method: str
    label: str
    cells: pd.DataFrame
    lrs: tuple[float, ...]
    dampings: tuple[float, ...]

    @property
    def num_rows(self) -> int:
        """Rows of cells."""
        return max(len(self.dampings), 1)

    @property
    def width(self) -> float:
        """Width of all cells; each has room for its learning rate below it and for a value of five characters."""
        characters = max(5, *(len(f"{lr:g}") for lr in self.lrs))
        return len(self.lrs) * (_CHARACTER * characters + 0.068)

    @property
    def tick_width(self) -> float:
        """Width of the dampings written to the left of the cells."""
        return max((_CHARACTER * len(f"{damping:g}") + 0.05 for damping in self.dampings), default=0.0)

    @property
    def title(self) -> str:
        """The label, broken into lines where it is far wider than the cells."""
        return wrapped(self.label, max(14, int(self.width / 0.07)))

    @property
    def slot_width(self) -> float:
        """Width of cells and dampings, or of the title where it is wider."""
        title = 0.07 * max(map(len, self.title.splitlines()))
        return self.tick_width + max(self.width, title)


@dataclasses.dataclass(frozen=True)
class Place:
    """Where something stands: inches from the left and the top edge of the page.

    Attributes:
        left: Left edge.
        top: Upper edge.
        index: Which of the things placed: the index of a header, or of a map in its panel.
        panel: Name of the panel.
        quantity: Column of the values.
        has_damping_label: Whether the axis label "Damping" stands to the left of this map.
    """

    left: float
    top: float
    index: int
    panel: str
    quantity: str
    has_damping_label: bool = False


@dataclasses.dataclass(frozen=True)
class Page:
    """A layout.

    Attributes:
        width: Inches.
        height: Inches.
        panels: Places of the panels' titles; none if there is a single panel.
        headers: Places of the headings with the colour scales.
        maps: Places of the maps' cells.
    """

    width: float
    height: float
    panels: tuple[Place, ...]
    headers: tuple[Place, ...]
    maps: tuple[Place, ...]


def lay_out(maps: dict[str, list[GridMap]], quantities: Sequence[str], has_title: bool, has_key: bool) -> Page:
    """Place all maps: per panel and quantity a heading, and below it the maps of all methods in order.

    Args:
        maps: The maps of each panel.
        quantities: Columns of the values.
        has_title: Whether the figure has a title.
        has_key: Whether something is explained at the foot.
    """
    everything = [grid_map for panel_maps in maps.values() for grid_map in panel_maps]
    needed = max(grid_map.slot_width + (_DAMPING_LABEL if grid_map.dampings else 0) for grid_map in everything)
    width = max(PAGE_WIDTH, needed + 2 * MARGIN)
    panels: list[Place] = []
    headers: list[Place] = []
    places: list[Place] = []
    top = _FIGURE_TITLE if has_title else 0.08
    for panel, panel_maps in maps.items():
        if len(maps) > 1:
            panels.append(Place(MARGIN, top, len(panels), panel, ""))
            top += _PANEL_HEADER
        for quantity in quantities:
            headers.append(Place(MARGIN, top, len(headers), panel, quantity))
            top += _HEADER
            for row in _rows(panel_maps, width - 2 * MARGIN):
                top = _place_row(panel_maps, row, top, places, panel, quantity)
    return Page(width, top + _KEY * has_key, tuple(panels), tuple(headers), tuple(places))


def _place_row(
    maps: list[GridMap], row: list[int], top: float, places: list[Place], panel: str, quantity: str
) -> float:
    """Place maps side by side, their cells beginning at the same height; return where the next row begins."""
    left = MARGIN
    top += _TITLE_LINE * max(len(maps[index].title.splitlines()) for index in row) + 0.03
    is_labelled = False
    for index in row:
        has_label = bool(maps[index].dampings) and not is_labelled
        left += _DAMPING_LABEL if has_label else 0.0
        is_labelled |= has_label
        places.append(Place(left + maps[index].tick_width, top, index, panel, quantity, has_label))
        left += maps[index].slot_width + _GAP
    return top + CELL_HEIGHT * max(maps[index].num_rows for index in row) + _BELOW


def _rows(maps: list[GridMap], width: float) -> list[list[int]]:
    """Return the indices of the maps in each row.

    Maps with and without damping, which differ in height, share a row only if all maps fit into one.
    """
    everything = list(range(len(maps)))
    if _row_width(maps) <= width:
        return [everything]
    kinds = itertools.groupby(everything, key=lambda index: bool(maps[index].dampings))
    return [row for _, kind in kinds for row in _even_rows(list(kind), maps, width)]


def _even_rows(indices: list[int], maps: list[GridMap], width: float) -> list[list[int]]:
    """Return as few rows as fit, with numbers of maps as equal as possible."""
    for count in range(1, len(indices)):
        rows = [part.tolist() for part in np.array_split(indices, count)]
        if all(_row_width([maps[index] for index in row]) <= width for row in rows):
            return rows
    return [[index] for index in indices]


def _row_width(maps: list[GridMap]) -> float:
    """Return the inches that maps need side by side."""
    label = _DAMPING_LABEL if any(grid_map.dampings for grid_map in maps) else 0.0
    return label + sum(grid_map.slot_width for grid_map in maps) + _GAP * (len(maps) - 1)
