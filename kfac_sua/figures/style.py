"""Looks of methods that no table knows, and settings that make figures legible and reproducible."""

import dataclasses
import itertools
import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence

from kfac_sua.figures.curves import FigureError
from kfac_sua.methods import METHODS, Dashes, MethodStyle

# Looks of all other methods. The colours are the "muted" ones of Tol (2021); no known method has one of these.
_FREE_COLORS = ("#332288", "#44AA99", "#882255", "#DDCC77", "#117733", "#88CCEE", "#AA4499", "#999933", "#CC6677")
_FREE_MARKERS = ("o", "s", "^", "D", "v", "P", "<", ">", "p", "d", "h", "8")
_FREE_LINESTYLES: tuple[Dashes, ...] = (
    *("-", (0, (5, 1.5)), (0, (1.5, 1)), (0, (5, 1.5, 1, 1.5)), (0, (9, 2)), (0, (3, 1.2)), (0, (1, 2.2))),
    *((0, (7, 1.2, 1, 1.2, 1, 1.2)), (0, (9, 1.5, 3, 1.5)), (0, (12, 1.5, 1, 1.5))),
)


def method_styles(methods: Sequence[str], labels: Mapping[str, str] | None = None) -> dict[str, MethodStyle]:
    """Return a look for every method of a figure.

    A name in ``METHODS`` has the same look everywhere. Any other name, such as those of an ablation, gets by its place
    in the list a colour and a marker that no other method of the list has, and a line style of its own while there are
    any left.

    Args:
        methods: Names, each once, in the order of the legend.
        labels: Labels that replace those of ``METHODS``; a name that is in neither is its own label.

    Returns:
        Looks by name, in the order given.

    Raises:
        FigureError: If there are more other names than looks.
    """
    labels = labels or {}
    known = [METHODS[name] for name in methods if name in METHODS]
    others = [name for name in methods if name not in METHODS]
    markers = [marker for marker in _FREE_MARKERS if marker not in {style.marker for style in known}]
    linestyles = [dashes for dashes in _FREE_LINESTYLES if dashes not in {style.linestyle for style in known}]
    looks = list(zip(_FREE_COLORS, itertools.cycle(linestyles), markers, strict=False))
    if len(others) > len(looks):
        raise FigureError(
            f"Beside {len(known)} methods with a fixed look, {len(looks)} can be told apart in one figure,"
            f" got {len(others)} ({', '.join(others)}); draw fewer."
        )
    styles = METHODS | {name: MethodStyle(name, *look) for name, look in zip(others, looks, strict=False)}
    return {name: dataclasses.replace(styles[name], label=labels.get(name, styles[name].label)) for name in methods}


def styles_with(methods: Iterable[str], labels: Mapping[str, str] | None = None) -> dict[str, MethodStyle]:
    """Return ``METHODS``, followed by a look for each of the methods that is not among them.

    Args:
        methods: Names, in the order of the legend.
        labels: As in :func:`method_styles`.
    """
    return method_styles([*METHODS, *dict.fromkeys(name for name in methods if name not in METHODS)], labels)


def wrapped(label: str, width: int) -> str:
    """Return a label with line breaks, so that no line has more than ``width`` characters unless a word has."""
    return "\n".join(textwrap.wrap(label, width, break_long_words=False)) or label


def short_number(value: float) -> str:
    """Return a number in at most five characters, for a cell or a bar.

    Args:
        value: Any number; a negative one takes a character more.
    """
    size = abs(value)
    if 0 < size < 0.00995 or 99_999.5 <= size < math.inf:
        mantissa, _, exponent = f"{value:.0e}".partition("e")
        return f"{mantissa}e{int(exponent)}"
    decimals = 3 if 0 < size < 0.9995 else 2 if 0 < size < 9.995 else 1 if 0 < size < 99.95 else 0
    return f"{value:.{decimals}f}"


def apply_style() -> None:
    """Set matplotlib's rcParams for all figures; ``matplotlib.rc_context()`` around it limits it to one.

    SVG files are made reproducible: the fixed salt keeps the identifiers in them from changing between calls.
    """
    import matplotlib  # here, so that the table of methods does not import it

    matplotlib.rcParams.update(
        {
            "font.size": 9,
            "axes.labelsize": 9,
            "axes.titlesize": 9,
            "figure.titlesize": 10.5,
            "legend.fontsize": 8.5,
            "xtick.labelsize": 8,
            "ytick.labelsize": 8,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.color": "#dddddd",
            "grid.linewidth": 0.6,
            "hatch.linewidth": 0.6,
            "lines.linewidth": 1.5,
            "lines.markersize": 4,
            "legend.frameon": False,
            "legend.title_fontsize": 8.5,
            "legend.handlelength": 3.3,
            "legend.columnspacing": 1.4,
            "savefig.dpi": 200,
            "svg.hashsalt": "kfac_sua",
        }
    )
