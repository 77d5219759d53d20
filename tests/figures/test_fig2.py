"""Figure 2: its panels, its two kinds of lines, and its numbers."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from figures.layout import assert_readable, assert_same_bytes, assert_written, texts
from figures.synthetic_frames import PAPER, finals
from runs.synthetic_runs import epoch_record, run_info, write_run

from kfac_sua.figures.curves import FigureError
from kfac_sua.figures.fig2 import draw_figure2, main
from kfac_sua.figures.style import method_styles
from kfac_sua.methods import METHODS

PANELS = [("left", "CIFAR-10, constant learning rate"), ("middle", "CIFAR-10, decay"), ("right", "CIFAR-100, decay")]
METHODS_DRAWN = ("baseline", "sua_grouped")


@pytest.fixture
def frame() -> pd.DataFrame:
    """Return three panels with two methods and three seeds."""
    parts = [finals(METHODS_DRAWN, 3, panel, epochs=8) for panel, _ in PANELS]
    parts[2] = parts[2].assign(dataset="cifar100")
    return pd.concat(parts, ignore_index=True)


def test_lines_are_the_numbers_of_the_csv(frame, drawn, tmp_path):
    """Every panel has a dashed training and a solid validation line per method, with exactly the CSV's points."""
    paths = draw_figure2(frame, PANELS, tmp_path)
    table = pd.read_csv(paths[2])
    assert list(table.columns[:8]) == ["panel", "method", "quantity", "x", "mean", "low", "high", "seeds"]
    for axes, (panel, _) in zip(drawn[0].axes, PANELS, strict=True):
        lines = axes.get_lines()
        assert len(lines) == 4
        expected = [
            (quantity, name) for quantity in ("train_error_percent", "val_error_percent") for name in METHODS_DRAWN
        ]
        for line, (quantity, name) in zip(lines, expected, strict=True):
            rows = table[(table["panel"] == panel) & (table["method"] == name) & (table["quantity"] == quantity)]
            np.testing.assert_allclose(line.get_xdata(), rows["x"], rtol=1e-12)
            np.testing.assert_allclose(line.get_ydata(), rows["mean"], rtol=1e-12)
            assert line.get_color() == METHODS[name].color
            assert line.get_marker() == METHODS[name].marker
            assert line.get_linestyle() == ("--" if quantity == "train_error_percent" else "-")


def test_numbers_are_percent_against_seconds(frame, tmp_path):
    """The first seed alone is drawn as recorded, in percent."""
    one = frame[(frame["seed"] == 0) & (frame["panel"] == "left") & (frame["method"] == "baseline")]
    table = pd.read_csv(draw_figure2(one, PANELS[:1], tmp_path)[2])
    validation = table[table["quantity"] == "val_error_percent"]
    np.testing.assert_allclose(validation["x"], one["train_time_s"])
    np.testing.assert_allclose(validation["mean"], 100 * one["val_error"])
    np.testing.assert_allclose(table.loc[table["quantity"] == "train_error_percent", "mean"], 100 * one["train_error"])


def test_files_are_complete_and_reproducible(frame, written, tmp_path):
    """The same table gives the same bytes in all three files."""
    first = draw_figure2(frame, PANELS, tmp_path / "a", title="PreAct-ResNet50", name="figure")
    assert_written(first, "figure", written[0])
    assert_same_bytes(first, draw_figure2(frame, PANELS, tmp_path / "b", title="PreAct-ResNet50", name="figure"))


@pytest.mark.parametrize("methods", [METHODS_DRAWN, tuple(METHODS)])
def test_texts_are_legible_and_apart(methods, drawn, tmp_path):
    """Titles, ticks and legend overlap neither with two methods nor with eight."""
    frame = pd.concat([finals(methods, 2, panel) for panel, _ in PANELS], ignore_index=True)
    draw_figure2(frame, PANELS, tmp_path, title="PreAct-ResNet50")
    assert_readable(drawn[0])
    shown = texts(drawn[0])
    for text in ("PreAct-ResNet50", "(a) CIFAR-10, constant learning rate", "Training", "Validation"):
        assert text in shown
    assert all(METHODS[name].label in shown for name in methods)
    assert "Mean and range of 2 seeds" in shown


def test_outcomes_that_differ_are_told_by_panel(frame, drawn, tmp_path):
    """A diverged seed is counted for its panel, and where all diverged a cross ends the line."""
    frame.loc[(frame["panel"] == "right") & (frame["method"] == "baseline") & (frame["seed"] == 1), "status"] = (
        "diverged"
    )
    frame.loc[(frame["panel"] == "left") & (frame["method"] == "sua_grouped"), "status"] = "diverged"
    draw_figure2(frame, PANELS, tmp_path)
    shown = texts(drawn[0])
    assert "Batch-norm baseline: (a) 3 finished; (b) 3 finished; (c) 2 finished, 1 diverged" in shown
    assert "Mean and range of finished seeds; a cross marks divergence" in shown
    assert [len([line for line in axes.get_lines() if line.get_marker() == "X"]) for axes in drawn[0].axes] == [2, 0, 0]
    assert_readable(drawn[0])


def test_five_panels_stand_in_two_rows(drawn, tmp_path):
    """More than three panels wrap, without empty axes left over."""
    panels = [(name, f"Panel {name}") for name in "abcde"]
    frame = pd.concat([finals(PAPER, 1, name) for name, _ in panels], ignore_index=True)
    draw_figure2(frame, panels, tmp_path, styles=method_styles(PAPER))
    assert len(drawn[0].axes) == 5
    assert_readable(drawn[0])


def test_what_cannot_be_drawn_is_refused(frame, tmp_path):
    """One sentence names the panel at fault."""
    with pytest.raises(FigureError, match="Panel 'top' has no runs, there are those of 'left', 'middle', 'right'"):
        draw_figure2(frame, [("top", "Top")], tmp_path)
    mixed = frame.assign(dataset=["cifar10", "cifar100"] * (len(frame) // 2))
    with pytest.raises(FigureError, match="Panel 'left' needs runs of one dataset, got cifar10, cifar100"):
        draw_figure2(mixed, PANELS, tmp_path)
    with pytest.raises(FigureError, match="Panel 'left': No run of method 'baseline' has ended"):
        draw_figure2(frame.assign(status="running"), PANELS, tmp_path)
    with pytest.raises(FigureError, match="Panel 'left': Method 'baseline' has 3 settings"):
        draw_figure2(frame.assign(fingerprint=frame["seed"].astype(str)), PANELS, tmp_path)
    with pytest.raises(FigureError, match="No style for method 'sua_grouped'"):
        draw_figure2(frame, PANELS, tmp_path, styles=method_styles(["baseline"]))
    assert not list(tmp_path.iterdir())


# --- command line -----------------------------------------------------------------------------------------------------


def _write(root: Path, schedule: str, method: str, lr: float, error: float) -> None:
    """Write one run of three epochs."""
    config = run_info(method, lr=lr).config | {"schedule": {"name": schedule}}
    records = [epoch_record(epoch, val_error=error / epoch) for epoch in (1, 2, 3)]
    write_run(root / schedule, records, method, lr=lr, config=config, fingerprint=f"{schedule}-{method}-{lr}")


def test_command_line_draws_a_panel_per_task_with_the_best_settings(drawn, tmp_path, capsys):
    """Titles come from the records, and so does the choice; of a campaign's directory the final runs are drawn."""
    for schedule in ("constant", "step"):
        for method in METHODS_DRAWN:
            _write(tmp_path / "final", schedule, method, 0.1, 0.6)
            _write(tmp_path / "final", schedule, method, 0.3, 0.9)
            _write(tmp_path / "grid", schedule, method, 0.1, 0.3)  # the same settings, which a wrong root would refuse
    assert main([str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "tiny on digits" in printed
    assert "fig2.png" in printed
    shown = texts(drawn[0])
    assert {"tiny on digits", "(a) digits, constant learning rate", "(b) digits, decay"} <= set(shown)
    table = pd.read_csv(tmp_path / "out" / "fig2.csv")
    assert set(table["base_lr"]) == {0.1}
    assert table.loc[table["quantity"] == "val_error_percent", "mean"].min() == pytest.approx(20.0)


def test_command_line_says_in_one_sentence_why_not(tmp_path, capsys):
    """No runs, none that has ended, or none of a method asked for; exit code 2 and no file."""
    out = ["--out", str(tmp_path / "out")]
    assert main([str(tmp_path), *out]) == 2
    write_run(tmp_path / "running", [epoch_record(1)], "sua", status="running")
    assert main([str(tmp_path / "running"), *out]) == 2
    _write(tmp_path / "ended", "constant", "baseline", 0.1, 0.5)
    assert main([str(tmp_path / "ended"), *out, "--methods", "baseline", "sua_grouped"]) == 2
    none, running, missing = capsys.readouterr().err.splitlines()
    assert none.startswith(f"No run below {tmp_path}")
    assert "sua still marked as running" in running
    assert "have no finished run: sua_grouped;" in missing
    assert not (tmp_path / "out").exists()
