"""Mean curves, first crossings and the table of times to a target, against numbers computed by hand."""

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from kfac_sua.campaign.bootstrap import interval, resampled_seeds
from kfac_sua.campaign.targets import first_reach, mean_curve, target_table
from kfac_sua.runs.comparable import CIRCUMSTANCES
from kfac_sua.runs.final_table import CollectError


def _run(method, seed, train_loss, val_error=None, seconds=10.0, panel="vgg11", status="finished"):
    """Return the rows of one run, whose epochs all take equally long."""
    epochs = np.arange(len(train_loss))
    values = {
        "panel": panel,
        "method": method,
        "run": f"{panel}/{method}/{seed}",
        "fingerprint": method,
        "precision": "float32",
        "seed": seed,
        "status": status,
        "epoch": epochs,
        "train_loss": train_loss,
        "val_error": train_loss if val_error is None else val_error,
        "train_time_s": seconds * epochs,
    }
    return pd.DataFrame(values)


def _table(*runs, resamples=200):
    """Return the target table of these runs, by method and target."""
    return target_table(pd.concat(runs, ignore_index=True), resamples).set_index(["panel", "method", "target"])


def test_mean_curve_is_the_mean_over_seeds_where_all_have_been():
    """Epochs that one seed has not reached are left out, however the rows are ordered."""
    runs = pd.concat([_run("sua", 1, [4.0, 2.0, 1.0], [0.9, 0.5, 0.1], 20.0), _run("sua", 0, [2.0, 1.0], [0.7, 0.1])])
    curve = mean_curve(runs.iloc[::-1])
    assert_array_equal(curve.epochs, [0, 1])
    assert_array_equal(curve.seconds, [0, 15])
    assert_array_equal(curve.train_loss, [3, 1.5])
    assert_allclose(curve.val_error, [0.8, 0.3])


def test_mean_curve_of_several_settings_or_none_is_an_error():
    """Runs of two settings would give a mean of nothing in particular."""
    runs = pd.concat([_run("sua", 0, [1.0]), _run("kfac", 1, [1.0])])
    with pytest.raises(CollectError, match="runs of one setting, got 2"):
        mean_curve(runs)
    with pytest.raises(CollectError, match="runs of one setting, got 0"):
        mean_curve(runs.iloc[:0])


@pytest.mark.parametrize(
    ("y", "target", "expected"),
    [
        pytest.param([4, 2, 1], 2, 10, id="at a point"),
        pytest.param([4, 2, 1], 3, 5, id="halfway between points"),
        pytest.param([4, 2, 1], 1.25, 25, id="three quarters of an interval of twenty"),
        pytest.param([4, 2, 1], 1, 30, id="at the last point"),
        pytest.param([4, 2, 1], 4, 0, id="at row 0"),
        pytest.param([4, 2, 1], 5, 0, id="below from row 0"),
        pytest.param([4, 2, 1], 0.5, math.inf, id="never"),
        pytest.param([4, 1, 3], 2, 20 / 3, id="first crossing, then up again"),
        pytest.param([2, 4, 1], 3, 0, id="below, up and below again"),
        pytest.param([4, 4, 2], 3, 20, id="after a plateau above"),
        pytest.param([4, 2, 2], 2, 10, id="first of equal points"),
        pytest.param([0.5, 0.4, 0.1 + 0.2], 0.3, 30, id="above by a rounding error"),
        pytest.param([1, 0, 0], 0, 10, id="zero"),
    ],
)
def test_first_reach(y, target, expected):
    """The straight pieces between points are followed to the first point at or below the target."""
    assert first_reach(np.array([0.0, 10.0, 30.0]), np.array(y, dtype=float), target) == pytest.approx(expected)


@settings(deadline=None)
@given(st.lists(st.integers(0, 20), min_size=1, max_size=8), st.integers(0, 20))
def test_first_reach_is_the_first_point_of_the_curve_at_or_below(values, target):
    """The curve is at the target there, or below it from the start, and above it everywhere before."""
    x, y = np.arange(len(values), dtype=float), np.array(values, dtype=float)
    reached = first_reach(x, y, target)
    before = np.linspace(0, min(reached, x[-1]), 50, endpoint=math.isinf(reached))
    if reached > 0:
        assert (np.interp(before, x, y) > target).all()
    if math.isfinite(reached):
        level = np.interp(reached, x, y)
        assert level == pytest.approx(target, abs=1e-9) or (reached == 0 and level < target)


def test_targets_are_those_of_the_baselines_mean_curve():
    """Its lowest mean error, not the mean of lowest errors, and its last mean loss, not its lowest."""
    table = _table(
        _run("baseline", 0, [4.0, 0.0, 2.0], [0.9, 0.2, 0.5]),
        _run("baseline", 1, [4.0, 1.0, 2.0], [0.9, 0.6, 0.3]),
        _run("sua", 0, [4.0, 1.0, 1.0], [0.9, 0.5, 0.3], seconds=20.0),
        _run("sua", 1, [4.0, 1.0, 1.0], [0.9, 0.5, 0.3], seconds=20.0),
    ).loc["vgg11"]
    assert_allclose(table.loc[("sua", "val_error"), ["target_value", "epochs", "seconds"]].to_list(), [0.4, 1.5, 30])
    assert_allclose(
        table.loc[("sua", "train_loss"), ["target_value", "epochs", "seconds"]].to_list(), [2, 2 / 3, 40 / 3]
    )
    # The mean loss of the baseline falls from 4 to 0.5 in the first epoch and ends at 2.
    assert_allclose(table.loc[("baseline", "train_loss"), ["epochs", "seconds"]].to_list(), [4 / 7, 40 / 7])
    assert list(table["seeds"]) == [2, 2, 2, 2]


def test_interval_of_three_seeds_is_the_range_of_single_seeds():
    """One seed drawn three times is a 27th of all resamples, more than the 40th that the interval cuts off."""
    baseline = [_run("baseline", seed, [4.0, 3.0, 2.0]) for seed in range(3)]
    # From 4 straight down to these in two epochs: 2 is reached after 4 / (4 - end) of them.
    sua = [_run("sua", seed, [4.0, 2 + end / 2, end]) for seed, end in enumerate([0.0, 0.8, 1.5])]
    row = _table(*baseline, *sua, resamples=2000).loc[("vgg11", "sua", "train_loss")]
    assert_allclose(row[["epochs_low", "epochs_high"]].to_list(), [1.0, 1.6])
    assert_allclose(row[["seconds_low", "seconds_high"]].to_list(), [10.0, 16.0])
    assert row["epochs"] == pytest.approx(4 / (4 - 2.3 / 3))


def test_every_resample_has_its_own_target():
    """The baseline needs all its epochs for its own last loss, however unlike its seeds are."""
    baseline = [_run("baseline", seed, [4.0, 3.0, end]) for seed, end in enumerate([0.5, 1.5, 2.5])]
    row = _table(*baseline).loc[("vgg11", "baseline", "train_loss")]
    assert row[["epochs", "epochs_low", "epochs_high"]].to_list() == [2, 2, 2]


def test_table_equals_the_slow_bootstrap():
    """Each resample as a frame of its own, averaged and searched one by one."""
    generator = np.random.default_rng(0)
    runs = {
        method: [_run(method, seed, generator.uniform(0, 2, size=6)) for seed in range(3)]
        for method in ("baseline", "sua")
    }

    def means(method):
        for seeds in resampled_seeds(3, 60, f"vgg11/{method}"):
            drawn = [runs[method][seed].assign(seed=draw) for draw, seed in enumerate(seeds)]
            yield mean_curve(pd.concat(drawn))

    reached = [
        first_reach(curve.seconds, curve.val_error, baseline.val_error.min())
        for curve, baseline in zip(means("sua"), means("baseline"), strict=True)
    ]
    assert np.unique(np.isinf(reached)).size == 2, "the case must hold resamples that never reach the target"
    row = _table(*runs["baseline"], *runs["sua"], resamples=60).loc[("vgg11", "sua", "val_error")]
    assert row[["seconds_low", "seconds_high"]].to_list() == [sorted(reached)[1], sorted(reached)[-2]]


def test_a_target_that_is_never_reached_is_infinitely_far():
    """Infinity, also as an interval, and not NaN."""
    baseline = [_run("baseline", seed, [4.0, 2.0]) for seed in range(3)]
    sua = [_run("sua", seed, [4.0, 3.0]) for seed in range(3)]
    numbers = _table(*baseline, *sua).loc[("vgg11", "sua", "val_error")]
    numbers = numbers.drop(["target_value", "seeds", "precision", *CIRCUMSTANCES])
    assert_array_equal(numbers.to_numpy(dtype=float), np.full(6, np.inf))


def test_seconds_of_several_precisions_are_refused():
    """Times to a target are those of one precision, which the table names; another panel's count too."""
    baseline, sua = _run("baseline", 0, [4.0, 2.0]), _run("sua", 0, [4.0, 1.0])
    tf32 = [run.assign(precision="tf32") for run in (baseline, sua)]
    assert set(_table(*tf32)["precision"]) == {"tf32"}
    for runs in ((baseline, tf32[1]), (baseline, sua, tf32[0].assign(panel="other"))):
        with pytest.raises(CollectError, match=r"in 2 precisions cannot be compared \(float32: .*; tf32: "):
            _table(*runs)


@pytest.mark.parametrize(("baseline_seeds", "sua_seeds"), [(1, 3), (3, 1)])
def test_one_seed_has_no_interval(baseline_seeds, sua_seeds):
    """Neither has a method whose targets come from one seed."""
    runs = [_run("baseline", seed, [4.0, 2.0]) for seed in range(baseline_seeds)]
    runs += [_run("sua", seed, [4.0, 1.0]) for seed in range(sua_seeds)]
    rows = _table(*runs).loc[("vgg11", "sua")]
    assert rows[["epochs_low", "epochs_high", "seconds_low", "seconds_high"]].isna().all(axis=None)
    assert_allclose(rows["epochs"], 2 / 3)
    assert list(rows["seeds"]) == [sua_seeds, sua_seeds]


def test_diverged_and_running_seeds_take_no_part():
    """The table is that of the finished seeds; a method without one has no row."""
    finished = [_run(method, seed, [4.0, 2.0 - seed]) for method in ("baseline", "sua") for seed in range(2)]
    others = [
        _run("baseline", 2, [4.0, math.nan], status="diverged"),
        _run("sua", 2, [4.0], status="running"),
        _run("kfac", 0, [4.0, math.nan], status="diverged"),
    ]
    pd.testing.assert_frame_equal(_table(*finished, *others), _table(*finished))


def test_a_panel_without_a_finished_baseline_has_no_rows():
    """Targets are the panel's own; those of another panel do not stand in."""
    table = _table(
        _run("sua", 0, [4.0, 1.0], panel="left"),
        _run("baseline", 0, [4.0, 1.0], panel="left", status="diverged"),
        _run("baseline", 0, [4.0, 1.0], panel="right"),
    )
    assert list(table.index) == [("right", "baseline", "val_error"), ("right", "baseline", "train_loss")]


def test_numbers_do_not_depend_on_what_stands_beside_them():
    """A further method, in front, changes no row of the others; nor does the order of the seeds."""
    generator = np.random.default_rng(1)
    few = [_run(method, seed, generator.uniform(0, 2, 4)) for method in ("baseline", "sua") for seed in range(3)]
    more = [_run("kfac", seed, generator.uniform(0, 2, 4)) for seed in range(3)]
    table, longer = _table(*few), _table(*more, *reversed(few))
    assert not table["epochs_low"].equals(table["epochs_high"])
    pd.testing.assert_frame_equal(longer.loc[table.index], table)


def test_an_empty_table_of_runs_gives_an_empty_table():
    """The columns are there all the same."""
    table = target_table(_run("baseline", 0, []))
    assert len(table) == 0
    assert list(table.columns[:4]) == ["panel", "method", "target", "target_value"]


@pytest.mark.parametrize(
    ("special", "count", "expected"),
    [
        pytest.param(math.inf, 0, (50, 1951), id="finite"),
        pytest.param(math.inf, 49, (50, 1951), id="infinities within the tail"),
        pytest.param(math.inf, 50, (50, math.inf), id="infinities beyond the tail"),
        pytest.param(math.nan, 49, (1, 1951), id="unknown values within the tails"),
        pytest.param(math.nan, 50, (0, math.inf), id="unknown values beyond the tails"),
        pytest.param(math.nan, 2000, (0, math.inf), id="nothing known"),
    ],
)
def test_interval_of_2000_values_leaves_out_49_at_either_end(special, count, expected):
    """The others are 1, 2, 3, …; infinity is a value like them, and a NaN is taken as the worst for either end."""
    values = np.concatenate([np.full(count, special), np.arange(1, 2001 - count)])
    assert interval(np.random.default_rng(0).permutation(values)) == expected


def test_seeds_are_drawn_uniformly_and_per_key():
    """Every pair of draws is equally frequent; another key draws otherwise, the same key alike."""
    drawn = resampled_seeds(2, 4000, "left/sua")
    pairs, counts = np.unique(drawn, axis=0, return_counts=True)
    assert_array_equal(pairs, [[0, 0], [0, 1], [1, 1]])
    assert_allclose(counts / 4000, [0.25, 0.5, 0.25], atol=0.04)  # five standard errors
    assert_array_equal(resampled_seeds(2, 4000, "left/sua"), drawn)
    others = resampled_seeds(2, 4000, "left/baseline")
    assert abs(np.corrcoef(drawn.sum(axis=1), others.sum(axis=1))[0, 1]) < 0.08
