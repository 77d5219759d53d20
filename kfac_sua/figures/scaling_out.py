"""Overhead of the preconditioner over SGD against the number of processes, one panel per model and way of scaling.

Solid lines are the whole overhead, thin dashed ones the application alone, which no process takes from another.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from kfac_sua.figures.files import PAGE_WIDTH, write_figure
from kfac_sua.figures.lines import draw_legend
from kfac_sua.figures.panels import method_names
from kfac_sua.methods import METHODS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MODELS = {"vgg11": "VGG11", "preact_resnet50": "PreAct-ResNet50"}
_DASHED = (0, (4, 1.5))


def draw_scaling_out(frame: pd.DataFrame, out_dir: Path, limit: float) -> list[Path]:
    """Draw overheads on logarithmic axes.

    Args:
        frame: A row per model, scaling, method and number of processes, as in study.csv.
        out_dir: Directory of the files, made if missing.
        limit: Overhead to draw a line at, a share of SGD's mini-batch.

    Returns:
        Paths of the PNG, the SVG and the CSV (the table).

    Raises:
        FigureError: If there is nothing to draw, or an unknown method.
    """
    names = method_names(frame, METHODS)
    panels = list(dict.fromkeys(zip(frame["model"], frame["scaling"], strict=True)))
    num_rows = -(-len(panels) // 2)

    def draw(figure: "Figure") -> None:
        grid = figure.subplots(num_rows, min(2, len(panels)), squeeze=False, sharex=True, sharey=True)
        for position, (axes, (model, scaling)) in enumerate(zip(grid.flat, panels, strict=False)):
            rows = frame[(frame["model"] == model) & (frame["scaling"] == scaling)]
            _draw_panel(axes, rows, names, limit)
            axes.set_title(_title(rows, model, scaling), loc="left", fontsize=8.5)
            axes.set_xlabel("GPUs" if position >= len(panels) - 2 else "")
            axes.set_ylabel("Overhead over SGD (%)" if position % 2 == 0 else "")
        _draw_legend(figure, names, limit)

    return write_figure(draw, frame, out_dir, "study", (PAGE_WIDTH, 1.0 + 2.5 * num_rows))


def _title(rows: pd.DataFrame, model: str, scaling: str) -> str:
    first = rows.iloc[0]
    batch = int(first["batch_per_process"])
    if scaling == "weak":
        return f"{_MODELS.get(model, model)}, {batch} examples per GPU"
    return f"{_MODELS.get(model, model)}, {batch * int(first['num_processes']):,} examples in all"


def _draw_panel(axes: "Axes", rows: pd.DataFrame, names: list[str], limit: float) -> None:
    from matplotlib.ticker import FuncFormatter, NullLocator

    axes.axhline(100 * limit, color="#555555", linewidth=0.8, linestyle=(0, (1, 1.5)), zorder=2)
    for name in names:
        own, style = rows[rows["method"] == name], METHODS[name]
        x = own["num_processes"]
        axes.plot(x, 100 * own["overhead"], color=style.color, marker=style.marker, zorder=3)
        applied = 100 * own["application_s"] / own["sgd_s"]
        axes.plot(x, applied, color=style.color, linestyle=_DASHED, linewidth=0.8, zorder=3)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    sizes = sorted(set(rows["num_processes"]))
    axes.set_xticks(sizes, [str(size) for size in sizes], fontsize=7)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _draw_legend(figure: "Figure", names: list[str], limit: float) -> None:
    from matplotlib.lines import Line2D

    lines = [Line2D([], [], color=METHODS[name].color, marker=METHODS[name].marker) for name in names]
    labels = [METHODS[name].label for name in names]
    lines.append(Line2D([], [], color="#555555", linestyle=_DASHED, linewidth=0.8))
    lines.append(Line2D([], [], color="#555555", linestyle=(0, (1, 1.5)), linewidth=0.8))
    draw_legend(figure, lines, [*labels, "Application alone", f"{100 * limit:g} %"], "Arithmetic, not a measurement")
