"""The heat maps of the tuning grid: every cell, its value, and what is diverged, missing or chosen."""

import numpy as np
import pandas as pd
import pytest
from figures.layout import assert_readable, assert_same_bytes, assert_written, texts
from figures.synthetic_frames import FINE_LRS, PAPER, grid_cells
from matplotlib.patches import Rectangle

from kfac_sua.figures.curves import FigureError
from kfac_sua.figures.grid_map import draw_grid_map
from kfac_sua.figures.style import method_styles, short_number
from kfac_sua.methods import METHODS

LRS, DAMPINGS = (0.1, 0.03, 0.01, 0.003), (1, 0.1, 0.01)
CHOSEN = {("vgg11", "baseline"): "baseline-0.032-None", ("vgg11", "sua"): "sua-0.03-0.1"}


def _grid(methods=PAPER, panel="vgg11") -> pd.DataFrame:
    """Return the grids of some methods: learning rates alone for those without damping."""
    parts = [
        grid_cells(name, LRS, DAMPINGS, panel) if name in PAPER[1:] else grid_cells(name, FINE_LRS, [None], panel)
        for name in methods
    ]
    return pd.concat(parts, ignore_index=True)


def _maps(figure) -> dict:
    """Return the axes with cells by title, the first of each quantity's."""
    return {axes.get_title(loc="left"): axes for axes in reversed(figure.axes) if axes.get_title(loc="left")}


def _cells(axes) -> list[Rectangle]:
    """Return the filled rectangles of a map."""
    return [patch for patch in axes.patches if patch.get_fill()]


def test_cells_show_the_numbers_of_the_csv(drawn, tmp_path):
    """Every finished cell of both quantities holds its value as text, at its place."""
    paths = draw_grid_map(_grid(), tmp_path, chosen=CHOSEN)
    table = pd.read_csv(paths[2])
    assert len(table) == 12 + 4 * 12
    maps = [axes for axes in drawn[0].axes if axes.get_title(loc="left")]
    assert len(maps) == 2 * 5
    for index, axes in enumerate(maps):
        quantity = "train_loss" if index < 5 else "val_error_percent"
        rows = table[table["method"] == PAPER[index % 5]]
        lrs, dampings = sorted(set(rows["lr"])), sorted(set(rows["damping"].dropna()))
        assert [label.get_text() for label in axes.get_xticklabels()] == [f"{lr:g}" for lr in lrs]
        assert [label.get_text() for label in axes.get_yticklabels()] == [f"{damping:g}" for damping in dampings]
        found = {(int(text.get_position()[0]), int(text.get_position()[1])): text.get_text() for text in axes.texts}
        expected = {
            (lrs.index(row.lr), dampings.index(row.damping) if dampings else 0): "×"
            if row.status == "diverged"
            else short_number(getattr(row, quantity))
            for row in rows.itertuples()
        }
        assert found == expected


def test_values_are_those_of_the_last_and_of_the_best_epoch(tmp_path):
    """Training loss of the last epoch, and the lowest validation error of any, in percent."""
    cell = grid_cells("sua", [0.03], [0.1])
    cell["val_error"] = [0.9, 0.3, 0.25, 0.28]
    cell["train_loss"] = [2.3, 1.0, 0.4, 0.6]
    row = pd.read_csv(draw_grid_map(cell, tmp_path)[2]).iloc[0]
    assert (row["train_loss"], row["val_error_percent"]) == (0.6, 25.0)


@pytest.mark.parametrize("unended", ["running", "failed"])
def test_diverged_missing_unfinished_and_chosen_cells_look_different(drawn, tmp_path, unended):
    """Diverged is hatched, running and failed are empty, missing is not there, chosen is framed."""
    grid = _grid(["sua"])
    grid = grid[grid["run"] != "vgg11/sua-0.003-1/seed=0"]
    grid.loc[grid["run"] == "vgg11/sua-0.003-0.1/seed=0", "status"] = unended
    draw_grid_map(grid, tmp_path, chosen=CHOSEN)
    axes = _maps(drawn[0])["SUA"]
    places = {(patch.get_x(), patch.get_y()): patch for patch in _cells(axes)}
    assert len(places) == 11
    assert (0, 2) not in places
    assert [place for place, patch in places.items() if patch.get_hatch()] == [(3, 0)]
    assert [place for place, patch in places.items() if np.allclose(patch.get_facecolor(), 1)] == [(0, 1)]
    assert {(patch.get_x(), patch.get_y()) for patch in axes.patches if not patch.get_fill()} == {(2, 1)}
    assert {"Chosen", "Diverged (×)", "Not finished"} <= set(texts(drawn[0]))


def test_colours_of_a_panel_and_quantity_are_on_one_scale(drawn, tmp_path):
    """Equal values have equal colours in all maps, and a lower value is darker in grey too."""
    draw_grid_map(_grid(), tmp_path)
    seen: dict[float, float] = {}
    table = pd.read_csv(tmp_path / "grid.csv")
    for title, axes in _maps(drawn[0]).items():
        name = next(name for name, style in METHODS.items() if style.label == title)
        rows = table[table["method"] == name].dropna(subset="train_loss").sort_values(["lr", "damping"])
        filled = [patch for patch in _cells(axes) if not patch.get_hatch()]
        for value, patch in zip(rows["train_loss"], filled, strict=True):
            grey = float(np.dot(patch.get_facecolor()[:3], (0.299, 0.587, 0.114)))
            assert seen.setdefault(value, grey) == grey
    values = sorted(seen)
    assert (np.diff([seen[value] for value in values]) >= -0.01).all()
    assert seen[values[-1]] - seen[values[0]] > 0.6


@pytest.mark.parametrize("methods", [PAPER, tuple(METHODS), ("baseline",), ("baseline", "sua")])
def test_texts_are_legible_and_apart(methods, drawn, tmp_path):
    """No cell, tick or title overlaps another, for one method or eight."""
    styles = method_styles(methods, {"sua_grouped": "SUA, groups of 32", "muon": "A very long label of some method"})
    draw_grid_map(_grid(methods), tmp_path, styles, title="Tuning grid")
    assert_readable(drawn[0])
    assert len(drawn[0].axes) == 2 * len(methods) + 2  # two colour scales


def test_grown_grid_and_small_grid_are_legible(drawn, tmp_path):
    """A fifth learning rate, a fourth damping and long numbers fit; so do maps narrower than their titles."""
    grown = pd.concat([_grid(PAPER[:4]), grid_cells("sua_grouped", (0.32, *LRS, 0.00095), (10, *DAMPINGS))])
    draw_grid_map(grown, tmp_path)
    tiny = pd.concat([grid_cells(name, (0.1, 0.03), [0.1]) for name in METHODS])
    draw_grid_map(tiny, tmp_path)
    for figure in drawn:
        assert_readable(figure)


def test_panels_stand_below_each_other_with_their_titles(drawn, tmp_path):
    """Each panel has its own maps and its own scale, in the order given."""
    panels = [("right", "CIFAR-100, decay"), ("left", "CIFAR-10, constant learning rate")]
    grid = pd.concat([_grid(("baseline", "sua_grouped"), panel) for panel in ("left", "middle", "right")])
    table = pd.read_csv(draw_grid_map(grid, tmp_path, panels=panels)[2])
    assert list(dict.fromkeys(table["panel"])) == ["right", "left"]
    assert len(drawn[0].axes) == 2 * 2 * (2 + 1)
    heights = {text.get_text(): text.get_window_extent().y0 for text in drawn[0].texts}
    assert heights["CIFAR-100, decay"] > heights["CIFAR-10, constant learning rate"]
    assert_readable(drawn[0])


@pytest.mark.slow
def test_files_are_complete_and_reproducible(written, tmp_path):
    """The same table gives the same bytes in all three files."""
    first = draw_grid_map(_grid(), tmp_path / "a", chosen=CHOSEN, title="Tuning grid")
    assert_written(first, "grid", written[0])
    assert_same_bytes(first, draw_grid_map(_grid(), tmp_path / "b", chosen=CHOSEN, title="Tuning grid"))


def test_grid_without_a_finished_cell_is_drawn(drawn, tmp_path):
    """If everything diverged, the map says so."""
    draw_grid_map(_grid(["sua"]).assign(status="diverged", train_loss=np.nan, val_error=np.nan), tmp_path)
    assert texts(drawn[0]).count("×") == 24
    assert pd.read_csv(tmp_path / "grid.csv")["train_loss"].isna().all()


def test_what_cannot_be_drawn_is_refused(tmp_path):
    """One sentence says what is wrong and what to do."""
    grid = _grid(["sua"])
    with pytest.raises(FigureError, match=r"'sua' has several runs with lr 0\.1 and damping 1;.*give one seed"):
        draw_grid_map(pd.concat([grid, grid.assign(run=grid["run"] + "-again")]), tmp_path)
    with pytest.raises(FigureError, match="'sua' has runs with and without damping"):
        draw_grid_map(pd.concat([grid, grid_cells("sua", [0.1], [None])]), tmp_path)
    with pytest.raises(FigureError, match="chosen cell of method 'sua' is not in the grid"):
        draw_grid_map(grid, tmp_path, chosen={("vgg11", "sua"): "nothing"})
    with pytest.raises(FigureError, match="No style for method 'sua'"):
        draw_grid_map(grid, tmp_path, method_styles(["kfac"]))
    with pytest.raises(FigureError, match="nothing to draw"):
        draw_grid_map(grid.iloc[:0], tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_loss_that_exploded_does_not_flatten_the_colours(drawn, tmp_path):
    """What is above the untrained network's loss has one colour, which the scale says; the value is still written."""
    grid = _grid(["sua"]).sort_values(["run", "epoch"])
    last = grid.groupby("run", sort=False).tail(1).index[0]
    untrained = grid.groupby("run").head(1).assign(epoch=0, train_loss=2.3)
    grid.loc[last, "train_loss"] = 3e5
    draw_grid_map(pd.concat([untrained, grid[grid["epoch"] > 0]], ignore_index=True), tmp_path)
    found = texts(drawn[0])
    assert "≥ 2.30" in found
    assert short_number(3e5) in found


def test_panels_that_share_their_runs_each_have_all_cells(drawn, tmp_path):
    """At a small scale two panels may be one configuration; the maps of both are there, and both choices framed."""
    left = _grid(["sua"])
    grid = pd.concat([left, left.assign(panel="right")], ignore_index=True)
    chosen = {("vgg11", "sua"): "sua-0.03-0.1", ("right", "sua"): "sua-0.01-0.01"}
    table = pd.read_csv(draw_grid_map(grid, tmp_path, chosen=chosen)[2])
    assert table.groupby("panel").size().to_dict() == {"vgg11": 12, "right": 12}
    assert table.groupby("panel")["is_chosen"].sum().to_dict() == {"vgg11": 1, "right": 1}
    numbers = [table.loc[table["panel"] == name, "val_error_percent"].tolist() for name in ("vgg11", "right")]
    np.testing.assert_array_equal(*numbers)
    assert_readable(drawn[0])
