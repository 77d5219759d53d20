"""The time of a campaign, told before it starts: first steps, grid growth, starts of processes."""

import dataclasses
import multiprocessing
import re
from pathlib import Path

import pytest

from kfac_sua.campaign import engine
from kfac_sua.campaign.cell import Stage
from kfac_sua.campaign.definition import keep_methods, load_campaign, load_scale
from kfac_sua.campaign.engine import Jobs, Workers
from kfac_sua.campaign.first_steps import FirstSteps, take_first_steps
from kfac_sua.campaign.forecast import foretell
from kfac_sua.campaign.launcher import load_launcher
from kfac_sua.campaign.plan import Plan
from kfac_sua.campaign.selection import Rule
from kfac_sua.data import DataError

METHODS = ["baseline", "sua"]


class Known(Workers):
    """Workers whose first steps are known: 1 s per step, 2 s before, 4 s per process."""

    def first_steps(self, cells):
        """Return the same for all."""
        return {(cell.stage, cell.curve): FirstSteps(1.0, 2.0, 4.0) for cell in cells}


def make_plan(root: Path, scale: str = "smoke", *overrides: str) -> Plan:
    """Return two curves of Figure 1 with three seeds."""
    campaign = keep_methods(load_campaign("fig1"), METHODS, [])
    return Plan(campaign, load_scale(campaign, scale), root, 3, ("device=cpu", *overrides))


def test_sums_are_those_of_the_runs(tmp_path):
    """Grid and final runs by their steps, growth at most by one value per axis and step, processes included."""
    forecast = foretell(make_plan(tmp_path), Rule.one_standard_error, Known(2), with_data=False)
    cells = [cell for cell, _ in forecast.grid]
    finals = [cell for cell, _ in forecast.finals]
    assert (len(cells), len(finals)) == (4 + 4, 2 * 3)
    grid_run = forecast.estimator.seconds(*forecast.grid[0])
    final_run = forecast.estimator.seconds(*forecast.finals[0])
    assert forecast.grid_s == pytest.approx(8 * grid_run / 2)
    assert forecast.final_s == pytest.approx(6 * final_run)
    assert forecast.growth_s == pytest.approx((1 + 5) * grid_run / 2)  # 4 to 5 cells, and 2 × 2 to 3 × 3
    assert {cell.stage for cell in finals} == {Stage.final}
    (line,) = forecast.lines()
    start = "8 runs of the grid and 6 final runs to do: "
    time = r"about \d+ (s|min)"
    assert re.fullmatch(f"{start}{time} on this machine, and up to {time} more if all grids grow", line)


def test_hours_are_said_in_hours(tmp_path):
    """At the paper's size a second per step is days."""
    plan = make_plan(tmp_path, "full", "dataset.download=false")
    (line,) = foretell(plan, Rule.one_standard_error, Known(1), with_data=False).lines()
    assert re.search(r": about \d{2,}\.\d h on this machine", line)


def test_first_steps_are_taken_in_a_process_of_their_own(tmp_path):
    """Curves that cost the same are measured once; nothing of the process is left."""
    plan = make_plan(tmp_path)
    cells = [plan.grid_cells(key, grid)[0] for key, grid in plan.grids().items()]
    copies = [dataclasses.replace(cell, panel="copy") for cell in cells]
    taken = take_first_steps([*cells, *copies], {Stage.grid: 1}, {})
    assert len(taken) == 4
    for method in METHODS:
        assert taken[Stage.grid, ("copy", method)] == taken[Stage.grid, ("vgg11", method)]
    for steps in taken.values():
        assert not steps.problem
        assert 0 < steps.step_s < 60
        assert steps.setup_s > 0
        assert steps.start_s > 0
    assert not multiprocessing.active_children()
    assert not list(tmp_path.iterdir())


def test_a_curve_whose_steps_cannot_be_taken_says_why(tmp_path):
    """The time is not known then, and the sentence names the curve and the reason."""
    plan = make_plan(tmp_path, "smoke", "preconditioner.skip=[nowhere]")
    key = ("vgg11", "sua")
    steps = take_first_steps(plan.grid_cells(key, plan.grids()[key])[:1], {Stage.grid: 1}, {})[Stage.grid, key]
    assert steps.step_s is None
    assert "nowhere" in steps.problem
    assert take_first_steps([], {}, {}) == {}


def test_unknown_times_are_called_unknown(tmp_path):
    """A launcher with machines of its own: nothing is measured here, and no number is made up."""

    class Elsewhere(Workers):
        def first_steps(self, cells):
            return {}

    forecast = foretell(make_plan(tmp_path), Rule.one_standard_error, Elsewhere(2), with_data=False)
    (line,) = forecast.lines()
    assert line.endswith("how long they take is known once a run of every curve has completed an epoch")


def test_images_are_looked_for_before_anything_is_measured(tmp_path):
    """What no run could do without ends the command first."""

    class Never(Workers):
        def first_steps(self, cells):
            raise AssertionError("no first steps without images")

    plan = make_plan(tmp_path, "small", f"dataset.data_dir={tmp_path}", "dataset.download=false")
    with pytest.raises(DataError, match="does not exist"):
        foretell(plan, Rule.one_standard_error, Never(1), with_data=True)


def test_joblib_is_measured_here(tmp_path):
    """Its runs are carried out on this machine, so that their first steps tell."""
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    jobs = Jobs(load_launcher("joblib", [], 2, 2), tmp_path)
    plan = make_plan(tmp_path)
    key, grid = next(iter(plan.grids().items()))
    assert jobs.first_steps(plan.grid_cells(key, grid)[:1])[Stage.grid, key].step_s > 0


def test_threads_are_those_of_each_stage(tmp_path, monkeypatch):
    """Of a network that asks for none: runs side by side share the cores, and a final run has them all."""
    asked = []
    monkeypatch.setattr(engine, "num_cores", lambda: 8)
    monkeypatch.setattr(engine, "take_first_steps", lambda cells, threads, environment: asked.append(threads) or {})
    Workers(4).first_steps([])
    assert asked == [{Stage.grid: 2, Stage.final: None}]


def test_growth_of_panels_that_share_their_runs_counts_once(tmp_path):
    """At smoke two of Figure 2's three panels are the same runs: sums are those of two."""
    campaign = load_campaign("fig2")
    plan = Plan(campaign, load_scale(campaign, "smoke"), tmp_path, 1, ("device=cpu",))
    forecast = foretell(plan, Rule.one_standard_error, Known(1), with_data=False)
    run_s = forecast.estimator.seconds(*forecast.grid[0])
    assert len(forecast.grid) == 2 * (4 + 4)
    assert forecast.grid_s == pytest.approx(2 * 8 * run_s)
    assert forecast.growth_s == pytest.approx(2 * (1 + 5) * run_s)
    assert "more if all grids grow" in forecast.lines()[0]
