"""Figure 1 from run directories with known numbers."""

import struct
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
from figures.layout import assert_readable, texts
from figures.synthetic_frames import PAPER, finals
from runs.synthetic_runs import epoch_record, run_info, write_run

from kfac_sua.figures.curves import FigureError
from kfac_sua.figures.fig1 import draw_figure1, main
from kfac_sua.figures.style import method_styles
from kfac_sua.methods import METHODS
from kfac_sua.runs.collect import collect_runs
from kfac_sua.runs.final_table import CollectError

LOSS, ERROR = "train_loss_nats_per_epoch", "val_error_percent_per_s"


def _epochs(losses: list, errors: list, times: list) -> list:
    """Return one record per entry."""
    columns = zip(losses, errors, times, strict=True)
    return [
        epoch_record(epoch, train_loss=loss, val_error=error, train_time_s=time)
        for epoch, (loss, error, time) in enumerate(columns, start=1)
    ]


def _two_seeds(root: Path, name: str = "sua") -> None:
    """Write two finished seeds of one method, the second slower."""
    write_run(root, _epochs([2.0, 1.0, 0.5], [0.5, 0.3, 0.2], [10, 20, 30]), name, seed=0)
    write_run(root, _epochs([4.0, 2.0, 0.7], [0.6, 0.4, 0.2], [12, 24, 36]), name, seed=1)


def _points(out_dir: Path, method: str, panel: str) -> pd.DataFrame:
    """Return the plotted numbers of one curve."""
    table = pd.read_csv(out_dir / "fig1.csv")
    return table[(table["method"] == method) & (table["panel"] == panel)].reset_index(drop=True)


def test_loss_is_averaged_per_epoch(tmp_path):
    """Mean and range over two seeds at each epoch equal those computed by hand."""
    _two_seeds(tmp_path)
    draw_figure1(collect_runs(tmp_path), tmp_path / "out")
    points = _points(tmp_path / "out", "sua", LOSS)
    assert points["x"].tolist() == [1, 2, 3]
    np.testing.assert_allclose(points["mean"], [3.0, 1.5, 0.6], rtol=1e-12)
    assert points["low"].tolist() == [2.0, 1.0, 0.5]
    assert points["high"].tolist() == [4.0, 2.0, 0.7]
    assert points["seeds"].tolist() == [2, 2, 2]


def test_error_is_interpolated_on_the_time_that_all_seeds_cover(tmp_path):
    """In percent, at every epoch end between 12 s (the slower start) and 30 s (the faster end)."""
    _two_seeds(tmp_path)
    draw_figure1(collect_runs(tmp_path), tmp_path / "out")
    points = _points(tmp_path / "out", "sua", ERROR)
    first = np.array([46.0, 30.0, 26.0, 20.0])  # 50 - 20*2/10; measured; 30 - 10*4/10; measured
    second = np.array([60.0, 60 - 20 * 8 / 12, 40.0, 30.0])
    assert points["x"].tolist() == [12, 20, 24, 30]
    np.testing.assert_allclose(points["mean"], (first + second) / 2, rtol=1e-12)
    np.testing.assert_allclose(points["low"], first, rtol=1e-12)
    np.testing.assert_allclose(points["high"], second, rtol=1e-12)


def test_single_seed_is_plotted_as_recorded(tmp_path):
    """With one seed the curves are the recorded numbers and the legend says so."""
    write_run(tmp_path, _epochs([2.0, 1.0], [0.5, 0.3], [10, 20]), "baseline")
    _, svg, _ = draw_figure1(collect_runs(tmp_path), tmp_path / "out")
    points = _points(tmp_path / "out", "baseline", ERROR)
    assert points[["x", "mean", "low", "high"]].to_numpy().tolist() == [[10, 50, 50, 50], [20, 30, 30, 30]]
    assert "One seed per method" in svg.read_text()


def test_files_are_reproducible_and_of_the_stated_size(tmp_path):
    """The same table gives the same bytes, whatever the reader's rcParams, and the PNG has 200 dots per inch."""
    for name in METHODS:
        _two_seeds(tmp_path, name)
    frame = collect_runs(tmp_path)
    before = dict(matplotlib.rcParams)
    first = draw_figure1(frame, tmp_path / "a", title="A title")
    assert dict(matplotlib.rcParams) == before
    with matplotlib.rc_context({"font.size": 20, "lines.linewidth": 9}):
        second = draw_figure1(frame, tmp_path / "b", title="A title")
    assert [path.name for path in first] == ["fig1.png", "fig1.svg", "fig1.csv"]
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes()
    width, height = struct.unpack(">II", first[0].read_bytes()[16:24])
    assert (width, height) == (1440, 720)
    svg = first[1].read_text()
    assert "dc:date" not in svg
    for text in ("A title", "Training time (s)", *(style.label for style in METHODS.values())):
        assert text in svg


def test_diverged_seed_is_left_out_of_the_mean_and_counted_in_the_legend(tmp_path):
    """A diverged seed does not enter the mean of the finished ones, and the reader is told."""
    _two_seeds(tmp_path)
    write_run(tmp_path, _epochs([9.0, np.inf], [0.9, 0.9], [10, 20]), seed=2, status="diverged")
    write_run(tmp_path, _epochs([9.0], [0.9], [10]), seed=3, status="running")
    write_run(tmp_path, _epochs([9.0], [0.9], [10]), seed=4, status="failed", failure="Out of memory.")
    _, svg, _ = draw_figure1(collect_runs(tmp_path), tmp_path / "out")
    assert _points(tmp_path / "out", "sua", LOSS)["high"].tolist() == [4.0, 2.0, 0.7]
    assert "SUA (2 finished, 1 diverged, 1 running, 1 failed)" in svg.read_text()


def test_method_that_only_diverged_is_drawn_to_its_last_common_finite_epoch(tmp_path):
    """Two diverged seeds are averaged over the epochs before either was non-finite."""
    write_run(tmp_path, _epochs([2.0, 4.0, 8.0], [0.5, 0.6, 0.7], [10, 20, 30]), seed=0, status="diverged")
    write_run(tmp_path, _epochs([4.0, 6.0, np.nan], [0.5, 0.8, 0.9], [10, 20, 30]), seed=1, status="diverged")
    _two_seeds(tmp_path, "baseline")
    _, svg, _ = draw_figure1(collect_runs(tmp_path), tmp_path / "out")
    points = _points(tmp_path / "out", "sua", LOSS)
    assert points["mean"].tolist() == [3.0, 5.0]
    assert set(points["status"]) == {"diverged"}
    assert _points(tmp_path / "out", "sua", ERROR)["mean"].tolist() == [50.0, 70.0]
    assert "SUA (2 diverged)" in svg.read_text()
    assert "a cross marks divergence" in svg.read_text()


def test_method_without_a_single_epoch_is_still_in_the_legend(tmp_path):
    """A run that diverged in its first epoch has nothing to draw but is not dropped."""
    write_run(tmp_path, [], status="diverged")
    _, svg, _ = draw_figure1(collect_runs(tmp_path), tmp_path / "out")
    assert "SUA (1 diverged)" in svg.read_text()
    assert len(pd.read_csv(tmp_path / "out" / "fig1.csv")) == 0


def test_exploding_loss_does_not_break_the_axes(tmp_path):
    """Losses up to the largest float are drawn without a warning beside ordinary ones."""
    _two_seeds(tmp_path, "baseline")
    write_run(tmp_path, _epochs([2.0, 1e30, 1e308], [0.5, 0.9, 0.9], [10, 20, 30]), status="diverged")
    draw_figure1(collect_runs(tmp_path), tmp_path / "out")
    assert _points(tmp_path / "out", "sua", LOSS)["mean"].tolist() == [2.0, 1e30, 1e308]


def test_lines_are_the_numbers_of_the_csv(drawn, tmp_path):
    """Both panels have one line per method, in its look, with exactly the CSV's points."""
    table = pd.read_csv(draw_figure1(finals(), tmp_path)[2])
    for axes, panel in zip(drawn[0].axes, (LOSS, ERROR), strict=True):
        assert len(axes.get_lines()) == 5
        for line, name in zip(axes.get_lines(), PAPER, strict=True):
            points = table[(table["method"] == name) & (table["panel"] == panel)]
            np.testing.assert_allclose(line.get_xdata(), points["x"], rtol=1e-12)
            np.testing.assert_allclose(line.get_ydata(), points["mean"], rtol=1e-12)
            assert (line.get_color(), line.get_marker()) == (METHODS[name].color, METHODS[name].marker)
    assert_readable(drawn[0])


def test_method_column_goes_before_the_preconditioner(drawn, tmp_path):
    """Two settings of one preconditioner are two methods if the frame says so, under the labels given."""
    frame = finals(["sua", "sua_reduce"]).assign(preconditioner="sua")
    styles = method_styles(["sua", "sua_reduce"], {"sua_reduce": "SUA, reduce"})
    paths = draw_figure1(frame, tmp_path, styles=styles, name="ablation")
    assert [path.name for path in paths] == ["ablation.png", "ablation.svg", "ablation.csv"]
    assert set(pd.read_csv(paths[2])["method"]) == {"sua", "sua_reduce"}
    assert {"SUA", "SUA, reduce"} <= set(texts(drawn[0]))


@pytest.mark.parametrize("epochs", [6, 90])
def test_markers_are_few_and_apart(drawn, tmp_path, epochs):
    """However many epochs, no line has more than fifteen markers or fewer than five, and no legend or tick overlaps."""
    draw_figure1(finals(list(METHODS), epochs=epochs), tmp_path, title="With comparators")
    for line in [line for axes in drawn[0].axes for line in axes.get_lines()]:
        assert 5 <= len(line.get_markevery()) <= 15
    assert_readable(drawn[0])


def test_several_settings_of_a_method_are_refused(tmp_path):
    """Curves of different learning rates are never averaged."""
    for lr in (0.1, 0.3):
        write_run(tmp_path, _epochs([2.0], [0.5], [10]), lr=lr)
    with pytest.raises(FigureError, match="'sua' has 2 settings"):
        draw_figure1(collect_runs(tmp_path), tmp_path / "out")


def test_several_models_and_unknown_methods_are_refused(tmp_path):
    """A figure shows one model on one data set, with methods that have a style."""
    _two_seeds(tmp_path)
    frame = collect_runs(tmp_path)
    mixed = frame.assign(model=["tiny"] * 3 + ["vgg11"] * 3)
    with pytest.raises(FigureError, match="one model, got tiny, vgg11"):
        draw_figure1(mixed, tmp_path / "out")
    with pytest.raises(FigureError, match="No style for method 'adam'"):
        draw_figure1(frame.assign(preconditioner="adam"), tmp_path / "out")
    with pytest.raises(FigureError, match="one dataset, got none"):
        draw_figure1(frame.iloc[:0], tmp_path / "out")


def test_seeds_without_common_training_time_are_refused(tmp_path):
    """Errors measured at times that do not overlap have no mean."""
    write_run(tmp_path, _epochs([2.0, 1.0], [0.5, 0.3], [10, 20]), seed=0)
    write_run(tmp_path, _epochs([2.0, 1.0], [0.5, 0.3], [100, 200]), seed=1)
    with pytest.raises(FigureError, match="No training time is covered by all seeds of 'sua'"):
        draw_figure1(collect_runs(tmp_path), tmp_path / "out")


def test_running_method_is_refused(tmp_path):
    """A method of which nothing has ended cannot be drawn."""
    write_run(tmp_path, _epochs([2.0], [0.5], [10]), status="running")
    with pytest.raises(CollectError, match="sua still marked as running"):
        draw_figure1(collect_runs(tmp_path), tmp_path / "out")


def test_command_line_draws_the_best_setting_and_prints_it(tmp_path, capsys):
    """Of a grid, the setting with the lowest validation error is drawn, and the table names it."""
    write_run(tmp_path, _epochs([2.0], [0.5], [10]), lr=0.1)
    write_run(tmp_path, _epochs([2.0], [0.2], [10]), lr=0.3)
    main([str(tmp_path), "--out", str(tmp_path / "out"), "--methods", "sua"])
    printed = capsys.readouterr().out
    assert "of 2 settings" in printed
    assert "fig1.svg" in printed
    assert _points(tmp_path / "out", "sua", ERROR)[["mean", "base_lr"]].to_numpy().tolist() == [[20.0, 0.3]]


def test_groups_of_a_reduced_width_are_named(tmp_path, capsys):
    """Whichever are best, also where runs from before ``group_size_scaling`` lie below the same root."""
    for error, scaling in ((0.4, {}), (0.2, {"group_size_scaling": "width"})):
        config = run_info("grouped").config | {"model": {"name": "tiny", "width": 0.5}}
        config["preconditioner"] = config["preconditioner"] | {"group_size": 32} | scaling
        values = {"config": config, "fingerprint": f"val error {error}"}
        write_run(tmp_path / str(error), _epochs([2.0], [error], [10]), "grouped", **values)
    assert main([str(tmp_path), "--out", str(tmp_path / "out"), "--methods", "grouped"]) == 0
    assert "groups of 16" in capsys.readouterr().out
    svg = (tmp_path / "out" / "fig1.svg").read_text()
    assert "K-FAC, groups of 16" in svg


def test_command_line_fails_with_one_sentence_when_a_method_is_missing(tmp_path, capsys):
    """Without --methods all five are needed, and those without a finished run are named."""
    _two_seeds(tmp_path)
    assert main([str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "4 have no finished run: baseline, kfac, grouped, sua_grouped;" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
