"""Which panels and methods a table holds, in the order in which they are drawn."""

from collections.abc import Mapping, Sequence

import pandas as pd

from kfac_sua.figures.curves import FigureError
from kfac_sua.methods import MethodStyle


def with_names(frame: pd.DataFrame) -> pd.DataFrame:
    """Return a table with the columns ``panel`` and ``method``.

    Args:
        frame: Rows of ``collect_runs``, with these columns or without.

    Returns:
        The table; a missing ``method`` is ``preconditioner``, and a missing ``panel`` is one panel without a name.
    """
    method = frame["method"] if "method" in frame else frame["preconditioner"]
    return frame.assign(method=method, panel=frame.get("panel", ""))


def method_names(table: pd.DataFrame, styles: Mapping[str, MethodStyle]) -> list[str]:
    """Return the methods of a table in the order of the styles.

    Args:
        table: Table with a column ``method``.
        styles: Looks by method.

    Raises:
        FigureError: If there is no method, or one has no style.
    """
    found = set(table["method"])
    unknown = sorted(found - styles.keys())
    if unknown:
        raise FigureError(f"No style for method {unknown[0]!r}; known are {', '.join(styles)}.")
    if not found:
        raise FigureError("There is nothing to draw: the table has no rows; give it at least one method.")
    return [name for name in styles if name in found]


def panel_titles(table: pd.DataFrame, panels: Sequence[tuple[str, str]]) -> dict[str, str]:
    """Return the titles of the panels to draw.

    Args:
        table: Table with a column ``panel``.
        panels: Names and titles in order; empty for all panels of the table under their names.

    Returns:
        Titles by name, in order.

    Raises:
        FigureError: If a panel named has no rows.
    """
    found = list(dict.fromkeys(table["panel"]))
    if not panels:
        return {name: name for name in found}
    for name, _ in panels:
        if name not in found:
            known = ", ".join(map(repr, found)) or "none"
            raise FigureError(f"Panel {name!r} has no runs, there are those of {known}; train it or leave it out.")
    return dict(panels)


def check_uniform(frame: pd.DataFrame, place: str) -> None:
    """Raise if the runs of a panel cannot be compared with each other.

    Args:
        frame: Rows of ``collect_runs``.
        place: The figure or panel, for the message, such as ``Figure 1``.

    Raises:
        FigureError: If there is not exactly one data set, one model and one width of it.
    """
    for column in ("dataset", "model", *(["width"] if "width" in frame else [])):  # older tables have no width
        values = sorted(f"{value:g}" if column == "width" else value for value in set(frame[column]))
        if len(values) != 1:
            found = ", ".join(values) or "none"
            raise FigureError(f"{place} needs runs of one {column}, got {found}; give the directory of one.")
