"""One look per method, the same in every figure, and settings that make figures legible and reproducible."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class MethodStyle:
    """How the curves of one method are drawn.

    Attributes:
        label: Text of the legend.
        color: Hexadecimal RGB from the palette of Okabe and Ito (2008), told apart by colour-blind readers.
        linestyle: Dash pattern in matplotlib's notation, so that curves differ in grey print.
        marker: Marker in matplotlib's notation, for the same reason.
    """

    label: str
    color: str
    linestyle: str | tuple[int, tuple[float, ...]]
    marker: str


# Keyed by the name of the preconditioner, in the order of the legend.
METHODS = {
    "baseline": MethodStyle("Batch-norm baseline", "#000000", "-", "o"),
    "kfac": MethodStyle("K-FAC", "#0072B2", (0, (5, 1.5)), "s"),
    "grouped": MethodStyle("K-FAC, groups", "#009E73", (0, (5, 1.5, 1, 1.5)), "^"),
    "sua": MethodStyle("SUA", "#D55E00", (0, (7, 1.2, 1, 1.2, 1, 1.2)), "D"),
    "sua_grouped": MethodStyle("SUA, groups", "#CC79A7", (0, (1.5, 1)), "v"),
}


def apply_style() -> None:
    """Set matplotlib's rcParams for all figures; ``matplotlib.rc_context()`` around it limits it to one.

    SVG files are made reproducible: the fixed salt keeps the identifiers in them from changing between calls.
    """
    import matplotlib  # here, so that the names and colours of the methods cost no import of matplotlib

    matplotlib.rcParams.update(
        {
            "font.size": 9,
            "axes.labelsize": 9,
            "axes.titlesize": 9,
            "legend.fontsize": 8.5,
            "xtick.labelsize": 8,
            "ytick.labelsize": 8,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.color": "#dddddd",
            "grid.linewidth": 0.6,
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
