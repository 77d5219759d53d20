"""Figures that compare seconds show runs of one precision, and say where threads, devices or machines differ."""

import re
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from figures.layout import assert_readable, texts
from figures.synthetic_frames import PAPER, finals

from kfac_sua.campaign.targets import target_table
from kfac_sua.figures.fig1 import draw_figure1
from kfac_sua.figures.fig2 import draw_figure2
from kfac_sua.figures.time_split import draw_time_split
from kfac_sua.figures.time_to_target import draw_time_to_target
from kfac_sua.runs.final_table import CollectError

PANELS = [("left", "CIFAR-10"), ("right", "CIFAR-100")]
METHODS = ("baseline", "kfac")
Draw = Callable[[pd.DataFrame, list[tuple[str, str]], Path], list[Path]]


def _targets(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the tables of targets of campaigns that are each of one precision."""
    tables = [target_table(runs, resamples=10) for _, runs in frame.groupby("precision")]
    return pd.concat(tables, ignore_index=True)


FIGURES: dict[str, Draw] = {
    "fig2": lambda frame, panels, out: draw_figure2(frame, panels, out),
    "time_split": lambda frame, panels, out: draw_time_split(frame, out, panels=panels),
    "time_to_target": lambda frame, panels, out: draw_time_to_target(_targets(frame), out, panels=panels),
}


@pytest.mark.parametrize("draw", FIGURES.values(), ids=FIGURES)
def test_panels_of_several_precisions_are_refused(draw, drawn, tmp_path):
    """One sentence names the precisions and whose they are; panels that are not drawn do not matter."""
    before = "float32 (convolutions in TF32)"
    frame = pd.concat([finals(METHODS, 1, "left", precision=before), finals(METHODS, 1, "right", precision="tf32")])
    found = re.escape(f"({before}: baseline, kfac; tf32: baseline, kfac)")
    with pytest.raises(CollectError, match=rf"^Seconds of runs in 2 precisions cannot be compared {found}; [^.]*\.$"):
        draw(frame, PANELS, tmp_path)
    assert not drawn
    assert not list(tmp_path.iterdir())
    draw(frame, PANELS[:1], tmp_path)
    draw(frame.assign(precision="tf32"), PANELS, tmp_path)
    assert len(drawn) == 2


@pytest.mark.parametrize("draw", [draw_figure1, draw_time_split])
def test_methods_of_several_precisions_are_refused(draw, tmp_path):
    """That one method computes faster than the other is not what the figure is to show."""
    frame = pd.concat([finals(["baseline"], precision="tf32"), finals(["kfac"], precision="float32")])
    with pytest.raises(CollectError, match=r"\(float32: kfac; tf32: baseline\)"):
        draw(frame, tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_csv_of_a_figure_names_the_precision(drawn, tmp_path):
    """The plotted seconds are those of runs in this precision."""
    for paths in (
        draw_figure1(finals(METHODS, precision="tf32"), tmp_path),
        draw_figure2(finals(METHODS, 1, "left", precision="tf32"), PANELS[:1], tmp_path),
        FIGURES["time_to_target"](finals(METHODS, 1, "left", precision="tf32"), PANELS[:1], tmp_path),
    ):
        assert set(pd.read_csv(paths[2])["precision"]) == {"tf32"}
    assert len(drawn) == 3


@pytest.mark.parametrize("draw", [lambda frame, panels, out: draw_figure1(frame, out), *FIGURES.values()])
def test_seconds_that_cannot_be_compared_are_said_below_the_axes(draw, drawn, tmp_path):
    """However many lines that takes, all stands inside the page and below everything else; alike runs have no line."""
    frame = finals(PAPER, 2, "left").assign(device_name="a processor", machines="a host", process_counts="1")
    threads = frame["method"].map(lambda method: "2" if method == "baseline" else "1")
    draw(frame.assign(num_threads="1"), PANELS[:1], tmp_path)
    draw(frame.assign(num_threads=threads, machines="host " + threads), PANELS[:1], tmp_path)
    alike, different = drawn
    assert not any("comparable" in text for text in texts(alike))
    (caution,) = [text for text in different.texts if "comparable" in text.get_text()]
    assert "baseline ran with 2 CPU threads; kfac, grouped, sua and sua_grouped with 1." in " ".join(
        caution.get_text().split()
    )
    assert_readable(different)
    assert different.get_figheight() > alike.get_figheight()
    foot = caution.get_window_extent().y1
    assert all(legend.get_window_extent().y0 >= foot for legend in different.legends)
    assert all(axes.get_tightbbox().y0 >= foot for axes in different.axes)
