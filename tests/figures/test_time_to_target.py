"""Bars of epochs and seconds to the baseline's targets."""

import math

import numpy as np
import pandas as pd
import pytest
from figures.layout import assert_readable, assert_same_bytes, assert_written, texts
from figures.synthetic_frames import PAPER

from kfac_sua.figures.curves import FigureError
from kfac_sua.figures.style import method_styles
from kfac_sua.figures.time_to_target import draw_time_to_target
from kfac_sua.methods import METHODS

COLUMNS = ["panel", "method", "target", "target_value", "epochs", "epochs_low", "epochs_high"]
COLUMNS += ["seconds", "seconds_low", "seconds_high", "seeds", "precision"]


def _table(methods=PAPER, panels=("vgg11",), has_spread=True) -> pd.DataFrame:
    """Return a table in the columns of ``target_table``: later methods are faster."""
    rows = []
    for panel in panels:
        for index, name in enumerate(methods):
            for target, value in (("val_error", 0.241), ("train_loss", 0.0536)):
                epochs, seconds = 10 / (1 + 0.2 * index), 300 / (1 + 0.1 * index)
                spread = 0.1 if has_spread else math.nan
                low, high = 1 - spread, 1 + spread
                times = [epochs, low * epochs, high * epochs, seconds, low * seconds, high * seconds]
                rows.append([panel, name, target, value, *times, 3 if has_spread else 1, "float32"])
    return pd.DataFrame(rows, columns=COLUMNS)


def test_bars_are_the_numbers_of_the_csv(drawn, tmp_path):
    """Two rows (targets) of two charts (epochs, seconds) hold one bar per method, its length the CSV's value."""
    table = pd.read_csv(draw_time_to_target(_table(), tmp_path)[2])
    pd.testing.assert_frame_equal(
        table, _table().sort_values("target", ascending=False, kind="stable", ignore_index=True)
    )
    assert len(drawn[0].axes) == 4
    kinds = [(target, unit) for target in ("val_error", "train_loss") for unit in ("epochs", "seconds")]
    for axes, (target, unit) in zip(drawn[0].axes, kinds, strict=True):
        rows = table[table["target"] == target]
        np.testing.assert_allclose([bar.get_width() for bar in axes.patches], rows[unit], rtol=1e-12)
        centres = [bar.get_y() + bar.get_height() / 2 for bar in axes.patches]
        np.testing.assert_allclose(centres, range(5))
        assert all(bar.get_height() < 1 for bar in axes.patches)  # no two overlap
        whiskers = [line.get_xdata() for line in axes.get_lines() if len(line.get_xdata()) == 2][:5]
        np.testing.assert_allclose(whiskers, rows[[f"{unit}_low", f"{unit}_high"]])


def test_methods_stand_in_the_order_of_the_styles_with_value_and_ratio(drawn, tmp_path):
    """The order of the table does not matter; the baseline has no ratio to itself, and its line is drawn."""
    draw_time_to_target(_table()[::-1], tmp_path)
    labels = [label.get_text() for label in drawn[0].axes[0].get_yticklabels()]
    assert labels == [METHODS[name].label for name in METHODS if name in PAPER]
    assert "10.0" in texts(drawn[0])
    assert "7.14 (0.71×)" in texts(drawn[0])
    reference = [line for line in drawn[0].axes[0].get_lines() if list(line.get_xdata()) == [10, 10]]
    assert len(reference) == 1
    assert "To the baseline's lowest validation error, 24.1 %" in texts(drawn[0])
    assert "To the baseline's final training loss, 0.0536 nats" in texts(drawn[0])


def test_never_is_written_and_an_unbounded_interval_is_an_arrow(drawn, tmp_path):
    """A method that does not reach the target has no bar; one that sometimes does has an arrow to the right."""
    table = _table()
    table.loc[table["method"] == "kfac", COLUMNS[4:10]] = math.inf
    table.loc[table["method"] == "sua", ["epochs_high", "seconds_high"]] = math.inf
    draw_time_to_target(table, tmp_path)
    for axes in drawn[0].axes:
        assert len(axes.patches) == 4
        assert [text.get_text() for text in axes.texts][1] == "never"
        assert [line.get_marker() for line in axes.get_lines()].count(">") == 1
        assert math.isfinite(axes.get_xlim()[1])
    assert np.isinf(pd.read_csv(tmp_path / "time_to_target.csv")["epochs"]).sum() == 2
    assert_readable(drawn[0])


def test_single_seed_has_no_whiskers(drawn, tmp_path):
    """Without an interval there is a bar and its value alone."""
    draw_time_to_target(_table(has_spread=False), tmp_path)
    assert [len(axes.get_lines()) for axes in drawn[0].axes] == [1] * 4  # the reference line
    assert_readable(drawn[0])


@pytest.mark.parametrize("methods", [tuple(METHODS), ("baseline",), ("sua", "kfac")])
def test_texts_are_legible_and_apart(methods, drawn, tmp_path):
    """With eight methods, long labels and a title nothing overlaps; a missing baseline leaves out the ratios."""
    styles = method_styles(methods, {"sgd_no_bn": "A very long label of a method that nobody would call so"})
    draw_time_to_target(_table(methods), tmp_path, styles, title="Time to the baseline")
    assert_readable(drawn[0])
    assert any("×" in text for text in texts(drawn[0])) == (len(methods) == 8)


def test_panels_stand_below_each_other(drawn, tmp_path):
    """Each panel has a row per target, in the order given, under its title; one without targets is left out."""
    panels = [("right", "CIFAR-100, decay"), ("top", "Untrained"), ("left", "CIFAR-10, constant learning rate")]
    table = draw_time_to_target(_table(PAPER[:2], ("left", "middle", "right")), tmp_path, panels=panels)[2]
    assert list(dict.fromkeys(pd.read_csv(table)["panel"])) == ["right", "left"]
    assert len(drawn[0].axes) == 8
    assert "CIFAR-100, decay: to the baseline's lowest validation error, 24.1 %" in texts(drawn[0])
    assert_readable(drawn[0])


@pytest.mark.slow
def test_files_are_complete_and_reproducible(written, tmp_path):
    """The same table gives the same bytes in all three files."""
    first = draw_time_to_target(_table(), tmp_path / "a", title="A title")
    assert_written(first, "time_to_target", written[0])
    assert_same_bytes(first, draw_time_to_target(_table(), tmp_path / "b", title="A title"))


def test_what_cannot_be_drawn_is_refused(tmp_path):
    """One sentence says what is wrong."""
    with pytest.raises(FigureError, match="nothing to draw"):
        draw_time_to_target(_table().iloc[:0], tmp_path)
    with pytest.raises(FigureError, match="No style for method 'lion'"):
        draw_time_to_target(_table(("baseline", "lion")), tmp_path)
    with pytest.raises(FigureError, match="a target twice in one panel"):
        draw_time_to_target(pd.concat([_table(), _table()]), tmp_path)
    with pytest.raises(FigureError, match="Panel 'top' has no runs"):
        draw_time_to_target(_table(), tmp_path, panels=[("top", "Top")])
    assert not list(tmp_path.iterdir())
