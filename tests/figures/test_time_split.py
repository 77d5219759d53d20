"""Stacked bars of the seconds per epoch."""

import numpy as np
import pandas as pd
import pytest
from figures.layout import assert_readable, assert_same_bytes, assert_written, texts
from figures.synthetic_frames import PAPER, finals

from kfac_sua.figures.curves import FigureError
from kfac_sua.figures.style import method_styles
from kfac_sua.figures.time_split import PHASES, draw_time_split
from kfac_sua.methods import METHODS


def test_segments_are_the_numbers_of_the_csv(drawn, tmp_path):
    """Each bar is the sum of its phases, laid end to end, as in the CSV."""
    table = pd.read_csv(draw_time_split(finals(), tmp_path)[2])
    (axes,) = drawn[0].axes
    bars = np.array(axes.patches, dtype=object).reshape(len(PHASES), 5)  # [phases, methods]
    for column, name in enumerate(PAPER):
        rows = table[table["method"] == name].set_index("phase")["seconds_per_epoch"]
        widths = [bar.get_width() for bar in bars[:, column]]
        np.testing.assert_allclose(widths, rows[list(PHASES)], rtol=1e-12)
        starts = [bar.get_x() for bar in bars[:, column]]
        np.testing.assert_allclose(starts, np.cumsum([0, *widths[:-1]]), rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(sum(widths), rows["total"], rtol=1e-9)
        assert {round(bar.get_y() + bar.get_height() / 2, 6) for bar in bars[:, column]} == {column}


def test_mean_over_seeds_and_ratio(drawn, tmp_path):
    """The mean over finished seeds of the last epoch's seconds per epoch; the ratio is to the baseline's mean."""
    frame = finals(seeds=3)
    frame.loc[(frame["method"] == "kfac") & (frame["seed"] == 2), "status"] = "diverged"
    table = pd.read_csv(draw_time_split(frame, tmp_path)[2]).set_index(["method", "phase"])
    kfac = table.loc[("kfac", "total")]
    assert kfac["seeds"] == 2
    np.testing.assert_allclose(kfac["seconds_per_epoch"], 44 * 1.01)
    np.testing.assert_allclose(kfac["ratio_to_baseline"], 44 * 1.01 / (30 * 1.02))
    np.testing.assert_allclose(table.loc[("kfac", "inversion"), "seconds_per_epoch"], 0.12 * 44 * 1.01)
    assert "44.4 s (1.45×)" in texts(drawn[0])
    assert "30.6 s" in texts(drawn[0])


def test_time_in_no_phase_is_shown_if_there_is_any(drawn, tmp_path):
    """What train_time_s has beyond its phases is a phase of its own; rounding is not."""
    draw_time_split(finals(), tmp_path / "a")
    frame = finals()
    frame["forward_backward_s"] *= 0.9
    draw_time_split(frame, tmp_path / "b")
    assert "Other" not in texts(drawn[0])
    assert "Other" in texts(drawn[1])


def test_phases_that_exceed_the_total_by_rounding_leave_nothing_over(drawn, tmp_path):
    """What is in no phase is never negative: then it is zero, and has neither a segment nor an entry."""
    frame = finals()
    frame["forward_backward_s"] *= 1 + 1e-6
    table = pd.read_csv(draw_time_split(frame, tmp_path)[2])
    assert table.loc[table["phase"] == "other", "seconds_per_epoch"].tolist() == [0.0] * 5
    assert "Other" not in texts(drawn[0])
    assert min(bar.get_width() for bar in drawn[0].axes[0].patches) == 0.0


def _with_captured_steps(frame: pd.DataFrame, share: float) -> pd.DataFrame:
    """Return the frame as it were with this share of all steps without statistics captured."""
    parts = ["forward_backward_s", "application_s", "optimizer_s"]
    captured = share * frame[parts].sum(axis=1)
    return frame.assign(captured_s=captured, **{part: (1 - share) * frame[part] for part in parts})


def test_captured_steps_are_a_phase_without_parts(drawn, tmp_path):
    """They have a segment of their own where there are any, and what they consist of is in no other one."""
    eager = finals()
    captured = _with_captured_steps(eager, 0.9)
    captured = pd.concat([captured[captured["method"] != "kfac"], eager[eager["method"] == "kfac"]])
    captured["captured_s"] = captured["captured_s"].fillna(0.0)  # K-FAC's steps are not
    paths = [draw_time_split(frame, tmp_path / name) for name, frame in (("eager", eager), ("captured", captured))]
    before, after = (pd.read_csv(files[2]).set_index(["method", "phase"])["seconds_per_epoch"] for files in paths)
    assert "Captured steps" not in texts(drawn[0])
    assert "Captured steps" in texts(drawn[1])
    assert "Other" not in texts(drawn[1])
    parts = [("sua", part) for part in ("forward_backward", "application", "optimizer")]
    np.testing.assert_allclose(after["sua", "captured"], 0.9 * before[parts].sum())
    np.testing.assert_allclose(after[parts], 0.1 * before[parts])
    for kept in [("sua", "statistics"), ("sua", "inversion"), ("sua", "total"), ("kfac", "forward_backward")]:
        np.testing.assert_allclose(after[kept], before[kept])
    assert after["kfac", "captured"] == before["sua", "captured"] == 0.0
    assert_readable(drawn[1])


def test_making_mini_batches_is_a_phase(drawn, tmp_path):
    """Where it was measured it has a segment of its own; in older tables it has none, and the chart no entry for it."""
    frame = finals()
    paths = draw_time_split(frame, tmp_path / "old")
    assert "Mini-batches" not in texts(drawn[0])
    frame["data_s"] = 0.25 * frame["forward_backward_s"]
    frame["forward_backward_s"] *= 0.75
    new = draw_time_split(frame, tmp_path / "new")
    assert "Mini-batches" in texts(drawn[1])
    assert "Other" not in texts(drawn[1])
    old, new = (pd.read_csv(files[2]).set_index(["method", "phase"])["seconds_per_epoch"] for files in (paths, new))
    np.testing.assert_allclose(new["kfac", "data"], 0.25 * old["kfac", "forward_backward"])
    np.testing.assert_allclose(new["kfac", "total"], old["kfac", "total"])


def test_method_without_a_finished_run_keeps_its_place(drawn, tmp_path):
    """Its bar is empty and says why; without a finished baseline there are no ratios."""
    frame = finals()
    frame.loc[frame["method"] == "baseline", "status"] = "diverged"
    draw_time_split(frame, tmp_path)
    assert drawn[0].axes[0].texts[0].get_text() == "no finished run"
    assert not any("×" in text for text in texts(drawn[0]))
    draw_time_split(frame.assign(status="diverged"), tmp_path)
    assert texts(drawn[1]).count("no finished run") == 5


def test_phases_are_told_apart_in_grey():
    """Neighbouring phases differ in lightness, or one is hatched and the other is not."""
    from matplotlib.colors import to_rgb

    looks = [(float(np.dot(to_rgb(color), (0.299, 0.587, 0.114))), hatch) for _, color, hatch in PHASES.values()]
    for index, (grey, hatch) in enumerate(looks):
        for other_grey, other_hatch in looks[index + 1 :]:
            assert hatch != other_hatch or abs(grey - other_grey) > 0.15


@pytest.mark.parametrize("methods", [tuple(METHODS), ("baseline",)])
def test_texts_are_legible_and_apart(methods, drawn, tmp_path):
    """With eight methods, a long label and a title nothing overlaps."""
    styles = method_styles(methods, {"sgd_no_bn": "A very long label of a method that nobody would call so"})
    draw_time_split(finals(methods), tmp_path, styles, title="Where the time goes")
    assert_readable(drawn[0])


def test_panels_stand_below_each_other(drawn, tmp_path):
    """One chart per panel, in the order given."""
    frame = pd.concat([finals(PAPER[:2], panel=panel) for panel in ("left", "middle", "right")])
    draw_time_split(frame, tmp_path, panels=[("right", "CIFAR-100"), ("left", "CIFAR-10")])
    assert [axes.get_title(loc="left") for axes in drawn[0].axes] == ["CIFAR-100", "CIFAR-10"]
    assert_readable(drawn[0])


@pytest.mark.slow
def test_files_are_complete_and_reproducible(written, tmp_path):
    """The same table gives the same bytes in all three files."""
    first = draw_time_split(finals(), tmp_path / "a", title="A title")
    assert_written(first, "time_split", written[0])
    assert_same_bytes(first, draw_time_split(finals(), tmp_path / "b", title="A title"))


def test_frame_without_panel_and_method_is_drawn_by_preconditioner(drawn, tmp_path):
    """The rows of collect_runs as they are make one chart."""
    draw_time_split(finals().drop(columns=["panel", "method"]), tmp_path)
    assert len(drawn[0].axes[0].get_yticklabels()) == 5


def test_what_cannot_be_drawn_is_refused(tmp_path):
    """One sentence says what is wrong."""
    with pytest.raises(FigureError, match="nothing to draw"):
        draw_time_split(finals().iloc[:0], tmp_path)
    with pytest.raises(FigureError, match="No style for method 'sua'"):
        draw_time_split(finals(), tmp_path, method_styles(["baseline", "kfac", "grouped", "sua_grouped"]))
    with pytest.raises(FigureError, match="Panel 'top' has no runs"):
        draw_time_split(finals(), tmp_path, panels=[("top", "Top")])
    assert not list(tmp_path.iterdir())
