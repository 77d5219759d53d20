"""Grids, their edges and their growth."""

import pytest

from kfac_sua.campaign.grid import Grid, load_grid
from kfac_sua.config import CONFIG_DIR, ConfigError, ModelName, PreconditionerName
from kfac_sua.tuned import tuned

GRID = Grid(lr=(0.01, 0.03, 0.1), damping=(0.1, 1.0))


def test_points_are_the_product():
    """Every learning rate meets every damping; a method without damping has one cell per learning rate."""
    assert len(set(GRID.points())) == 6
    assert list(Grid((0.1, 0.2), None).points()) == [(0.1, None), (0.2, None)]


@pytest.mark.parametrize(
    ("lr", "damping", "expected"),
    [
        (0.03, None, ()),
        (0.01, 0.1, ("lr 0.01 is the lowest tried", "damping 0.1 is the lowest tried")),
        (0.1, 1.0, ("lr 0.1 is the highest tried", "damping 1 is the highest tried")),
        (0.03, 1.0, ("damping 1 is the highest tried",)),
    ],
)
def test_edges_are_named(lr, damping, expected):
    """Each axis on whose lowest or highest value the cell lies is named, with the value."""
    assert GRID.edges(lr, damping) == expected


def test_an_axis_of_one_value_has_no_edge():
    """One value is a choice, not a grid."""
    assert Grid((0.1,), (0.1, 1.0, 10.0)).edges(0.1, 1.0) == ()


def test_a_cell_inside_does_not_grow():
    """A best cell with neighbours on all sides leaves the grid as it is."""
    grid = Grid((0.01, 0.03, 0.1), (0.01, 0.1, 1.0))
    assert grid.grown(0.03, 0.1) == grid


def test_growth_continues_the_outermost_ratio():
    """0.1 after 0.03 is followed by 0.3, not by 0.33; 0.1 before 1 is preceded by 0.01; the other ends stay."""
    assert GRID.grown(0.1, 0.1) == Grid((0.01, 0.03, 0.1, 0.3), (0.01, 0.1, 1.0))
    assert GRID.grown(0.01, 1.0) == Grid((0.003, 0.01, 0.03, 0.1), (0.1, 1.0, 10.0))


@pytest.mark.parametrize(
    ("values", "below", "above"),
    [
        ((0.003, 0.01, 0.03, 0.1), 0.001, 0.3),
        ((0.056, 0.1, 0.18, 0.32, 0.56), 0.032, 1.0),  # four per decade
        ((0.1, 0.2, 0.5, 1.0), 0.05, 2.0),
        ((1.0, 2.0, 4.0), 0.5, 8.0),
        ((1.0, 1.1, 1.2), 0.91, 1.3),  # never a value that the grid has
        ((0.00003, 0.0001), 0.00001, 0.0003),
    ],
)
def test_growth_keeps_to_the_ladder_of_the_grid(values, below, above):
    """A new value has the digits that the grid has in other decades, or else two of its own."""
    grid = Grid(values, None)
    assert grid.grown(values[0], None).lr == (below, *values)
    assert grid.grown(values[-1], None).lr == (*values, above)


def test_growth_time_and_again_stays_on_the_ladder():
    """Three steps beyond 0.1 are 0.3, 1 and 3."""
    grid = Grid((0.01, 0.03, 0.1), None)
    for _ in range(3):
        grid = grid.grown(grid.lr[-1], None)
    assert grid.lr == (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)


def test_growth_of_a_line():
    """A method without damping grows in learning rate alone."""
    assert Grid((0.1, 0.2), None).grown(0.2, None) == Grid((0.1, 0.2, 0.4), None)


def test_every_sweep_is_read_ascending():
    """Every file of configs/sweep is a grid that a campaign can take, but those of sweepers that optimise."""
    names = [path.stem for path in (CONFIG_DIR / "sweep").glob("*.yaml") if not path.stem.startswith("optuna")]
    assert names
    with pytest.raises(ConfigError, match="sweep=optuna_lr_damping must hold numbers separated by commas, got 'tag"):
        load_grid("optuna_lr_damping")
    for name in names:
        grid = load_grid(name)
        assert list(grid.lr) == sorted(set(grid.lr))
    assert load_grid("lr_damping") == Grid((0.01, 0.03, 0.1, 0.3), (0.1, 1.0, 10.0))


def test_all_curves_have_equal_budgets():
    """What has no damping is tuned with as many runs as what has, at every scale."""
    sizes = {name: len(list(load_grid(name).points())) for name in ("lr_damping", "lr_fine", "lr_small")}
    assert set(sizes.values()) == {12}
    assert len(list(load_grid("lr_damping_short").points())) == len(list(load_grid("lr_short").points()))


def test_the_grid_holds_what_auto_stands_for():
    """The grid has the cell that ``auto`` gives, at full width."""
    grid = load_grid("lr_damping")
    for name in ("kfac", "grouped", "sua", "sua_grouped"):
        best = tuned(PreconditionerName(name), ModelName.vgg11, 1.0)
        assert best.lr in grid.lr
        assert best.damping in grid.damping


def test_unknown_sweep_lists_the_known():
    """A name that does not exist is answered with those that do."""
    with pytest.raises(ConfigError, match=r"no sweep 'lrr'; choose one of .*lr_damping"):
        load_grid("lrr")


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ("epochs: 1,2", "must sweep over optimizer.lr"),
        ("optimizer.lr: 0.1,fast", "numbers separated by commas, got '0.1,fast'"),
    ],
)
def test_a_sweep_that_is_no_grid_is_refused(tmp_path, monkeypatch, params, message):
    """Other keys and words that are not numbers are named."""
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "odd.yaml").write_text(f"sweeper:\n  params:\n    {params}\n")
    monkeypatch.setattr("kfac_sua.campaign.grid.CONFIG_DIR", tmp_path)
    with pytest.raises(ConfigError, match=message):
        load_grid("odd")
