"""Figures that compare seconds show runs of one precision."""

import re
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from figures.synthetic_frames import finals

from kfac_sua.campaign.targets import target_table
from kfac_sua.figures.fig1 import draw_figure1
from kfac_sua.figures.fig2 import draw_figure2
from kfac_sua.figures.time_split import draw_time_split
from kfac_sua.figures.time_to_target import draw_time_to_target
from kfac_sua.runs.collect import CollectError

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
