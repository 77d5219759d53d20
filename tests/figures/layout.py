"""What must hold of every figure, whatever the font: inside the page, nothing on top of each other, files complete."""

import itertools
import struct
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.text import Text

_SLACK = 2.0  # pixels, of which an inch has 100


def assert_written(paths: list[Path], name: str, figure: Figure) -> None:
    """Check names, that no file is empty, and that the PNG has 200 dots per inch of the figure."""
    assert [path.name for path in paths] == [f"{name}.png", f"{name}.svg", f"{name}.csv"]
    assert all(path.stat().st_size > 200 for path in paths)
    width, height = struct.unpack(">II", paths[0].read_bytes()[16:24])
    inches = figure.get_size_inches()
    assert abs(width - 200 * inches[0]) <= 1
    assert abs(height - 200 * inches[1]) <= 1
    assert "dc:date" not in paths[1].read_text()


def assert_same_bytes(first: list[Path], second: list[Path]) -> None:
    """Check that two calls wrote the same."""
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes(), one.suffix


def visible_texts(figure: Figure) -> list[Text]:
    """Return all texts of a figure that a reader sees, so no ticks beyond the limits of their axis."""
    beyond = set()
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        low, high = sorted(axis.get_view_interval())
        ticks = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
        beyond |= {id(tick.label1) for tick in ticks if not low <= tick.get_loc() <= high}
    shown = (text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip())
    return [text for text in shown if id(text) not in beyond]


def texts(figure: Figure) -> list[str]:
    """Return what the texts of a figure say."""
    return [text.get_text() for text in visible_texts(figure)]


def assert_readable(figure: Figure) -> None:
    """Check that all texts are at least 7 pt, lie within the page and do not overlap each other, nor axes each other.

    Boxes are those of the bundled font; a pair of axes counts without its labels.
    """
    figure.draw_without_rendering()  # gives everything its place
    page = figure.bbox
    assert all(text.get_fontsize() >= 7 for text in visible_texts(figure))
    boxes = [(text.get_text(), text.get_window_extent()) for text in visible_texts(figure)]
    for content, box in boxes:
        assert box.x0 >= page.x0 - _SLACK, content
        assert box.x1 <= page.x1 + _SLACK, content
        assert box.y0 >= page.y0 - _SLACK, content
        assert box.y1 <= page.y1 + _SLACK, content
    for (one, first), (other, second) in itertools.combinations(boxes, 2):
        assert not _overlap(first, second), (one, other)
    for first, second in itertools.combinations([axes.get_window_extent() for axes in figure.axes], 2):
        assert not _overlap(first, second)


def _overlap(first, second) -> bool:
    """Return whether two boxes share more than a pixel or two."""
    width = min(first.x1, second.x1) - max(first.x0, second.x0)
    height = min(first.y1, second.y1) - max(first.y0, second.y0)
    return width > _SLACK and height > _SLACK
