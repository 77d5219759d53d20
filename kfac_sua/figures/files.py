"""Figures as files: PNG, SVG and the CSV of the plotted numbers, the same bytes for the same table."""

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from kfac_sua.figures.style import apply_style, wrapped
from kfac_sua.files.atomic import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAGE_WIDTH = 7.2  # inches: the text width of a page
_FOOT_LINE = 0.14  # inches: a line of 8 pt text
_CAUTION_COLOR = "#B22222"  # dark enough to be read in grey, and no method's


def write_figure(
    draw: "Callable[[Figure], None]",
    numbers: pd.DataFrame,
    out_dir: Path,
    name: str,
    size: tuple[float, float],
    title: str | None = None,
    is_placed: bool = False,
    cautions: Sequence[str] = (),
) -> list[Path]:
    """Draw a figure in the project's style and write it with its numbers.

    Args:
        draw: Fills an empty figure; called once.
        numbers: What is drawn, for the CSV.
        out_dir: Directory of the files, made if missing.
        name: File name without ending.
        size: Width and height in inches.
        title: Line above everything.
        is_placed: Whether ``draw`` gives everything its place, with room for the title; if not, a layout engine does.
        cautions: Sentences for the foot of the figure, which grows by them; none where ``is_placed``.

    Returns:
        Paths of the PNG (200 dpi), the SVG (same input, same bytes) and the CSV.
    """
    import matplotlib
    from matplotlib.figure import Figure

    out_dir.mkdir(parents=True, exist_ok=True)
    png, svg, csv = (out_dir / f"{name}.{suffix}" for suffix in ("png", "svg", "csv"))
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # a matplotlibrc of the user's must not change the figure
        apply_style()
        # Without pyplot: no window, no global state, and PNG is drawn by Agg whatever the backend.
        figure = Figure(figsize=size, layout=None if is_placed else "constrained")
        draw(figure)
        if title:
            text = wrapped(title, int(size[0] / 0.085))
            position = {"y": 1 - 0.07 / size[1]} if is_placed else {}  # the engine would not make room for one
            figure.suptitle(text, **position)
        if cautions:
            _write_at_foot(figure, "\n".join(wrapped(sentence, int(size[0] / 0.068)) for sentence in cautions))
        for path, metadata in ((png, {}), (svg, {"Date": None})):
            content = io.BytesIO()
            figure.savefig(content, format=path.suffix[1:], metadata=metadata)
            write_atomically(path, content.getvalue())
    write_atomically(csv, numbers.to_csv(index=False).encode())
    return [png, svg, csv]


def _write_at_foot(figure: "Figure", text: str) -> None:
    """Write a text below the figure, which grows by it; the layout above does not change."""
    width, height = figure.get_size_inches()
    foot = 0.06 + _FOOT_LINE * len(text.splitlines())
    share = foot / (height + foot)
    figure.set_size_inches(width, height + foot)
    figure.set_layout_engine("constrained", rect=(0, share, 1, 1 - share))
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # which would put the legends below the rectangle again
    for legend in figure.legends:
        legend.set_bbox_to_anchor((0, share, 1, 1 - share), figure.transFigure)
    figure.text(0.5, share, text, ha="center", va="top", fontsize=8, color=_CAUTION_COLOR)
