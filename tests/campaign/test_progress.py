"""Estimates of the time that runs take, and what a campaign says while it runs."""

import dataclasses
from pathlib import Path

import pytest
from runs.synthetic_runs import epoch_record, run_info
from tiny_runs import tiny_config

from kfac_sua.campaign.cell import Cell, CellState, Stage, read_state
from kfac_sua.campaign.estimate import Estimator, num_steps, shown_seconds
from kfac_sua.campaign.first_steps import FirstSteps
from kfac_sua.campaign.progress import CampaignProgress
from kfac_sua.runs.directory import run_directory
from kfac_sua.runs.metrics import rewrite_records
from kfac_sua.runs.run_info import write_run_info

NOTHING = CellState("missing", 0)
BASELINE = (Stage.grid, ("panel", "baseline"))


def make_cell(root: Path, lr: float, method: str = "baseline", *, epochs: int = 10) -> Cell:
    """Return a tiny run of ten epochs of four steps."""
    config = tiny_config(root, "preconditioner=baseline", f"optimizer.lr={lr}", f"epochs={epochs}")
    return Cell(Stage.grid, "panel", method, (), config, run_directory(config, "cpu"))


def leave(cell: Cell, epochs: int, status: str, seconds_per_step: float = 0.5) -> None:
    """Write what a run leaves after some epochs of 50 steps: a row per epoch, the untrained network's first."""
    cell.directory.path.mkdir(parents=True)
    write_run_info(cell.directory.info, run_info("baseline", status=status))
    times = {epoch: 50 * seconds_per_step * epoch for epoch in range(1, epochs + 1)}
    untrained = dataclasses.replace(epoch_record(1, train_time_s=0.0, val_error=0.9), epoch=0, step=0)
    records = [epoch_record(epoch, train_time_s=time) for epoch, time in times.items()]
    rewrite_records(cell.directory.metrics, [untrained, *records])


def test_work_counts_training_and_evaluation(tmp_path):
    """Ten epochs of four steps; 600 images are evaluated 11 times and 297 once, at a third of a step per 100."""
    config = make_cell(tmp_path, 0.1).config
    assert num_steps(config) == pytest.approx(10 * 4 + (11 * (200 + 400) + 297) / 300)


def test_what_is_measured_replaces_what_is_known(tmp_path):
    """Seconds per step come from runs of the same curve, else from first steps, else are unknown."""
    done, to_do, other = make_cell(tmp_path, 0.1), make_cell(tmp_path, 0.2), make_cell(tmp_path, 0.3, "kfac")
    work = num_steps(to_do.config)
    estimator = Estimator([done, to_do], {BASELINE: FirstSteps(3.0)})
    assert estimator.seconds(to_do, NOTHING) == pytest.approx(3.0 * work)
    leave(done, 10, "finished")
    estimator.learn(done)
    assert estimator.seconds(to_do, NOTHING) == pytest.approx(0.5 * work)
    assert estimator.seconds(done, CellState("finished", 10)) == 0
    assert estimator.seconds(other, NOTHING) is None
    assert estimator.total([(to_do, NOTHING), (other, NOTHING)]) is None


def test_first_steps_of_runs_that_share_a_device(tmp_path):
    """Alone a step takes 1 s; among five on one GPU 5 s; a final run is alone, and pays the start of its process."""
    cell = make_cell(tmp_path, 0.1)
    final = dataclasses.replace(cell, stage=Stage.final)
    work = num_steps(cell.config)
    steps = FirstSteps(1.0, setup_s=2.0, start_s=7.0)
    estimator = Estimator([], {BASELINE: steps, (Stage.final, final.curve): steps}, sharing=5)
    assert estimator.seconds(cell, NOTHING) == pytest.approx(2 + 5 * work)
    assert estimator.seconds(final, NOTHING) == pytest.approx(2 + 7 + work)


def test_runs_of_the_grid_do_not_tell_of_final_runs(tmp_path):
    """They share devices and have other threads: a final run is known by first steps of its own, then by final runs."""
    done = make_cell(tmp_path, 0.1)
    final = dataclasses.replace(make_cell(tmp_path, 0.2), stage=Stage.final)
    leave(done, 10, "finished", seconds_per_step=0.5)
    assert Estimator([done], {}).seconds(final, NOTHING) is None
    estimator = Estimator([done], {(Stage.final, final.curve): FirstSteps(2.0)}, sharing=5)
    assert estimator.seconds(final, NOTHING) == pytest.approx(2 * num_steps(final.config))
    other = dataclasses.replace(make_cell(tmp_path, 0.3), stage=Stage.final)
    leave(other, 10, "finished", seconds_per_step=0.25)
    estimator.learn(other)
    assert estimator.seconds(final, NOTHING) == pytest.approx(0.25 * num_steps(final.config))


def test_several_at_a_time_take_as_long_as_the_longest(tmp_path):
    """Four equal runs by two take twice one's time; one run by eight takes its own."""
    cell = make_cell(tmp_path, 0.1)
    estimator = Estimator([], {BASELINE: FirstSteps(1.0)})
    work = num_steps(cell.config)
    assert estimator.total([(cell, NOTHING)] * 4, jobs=2) == pytest.approx(2 * work)
    assert estimator.total([(cell, NOTHING)], jobs=8) == pytest.approx(work)


def test_damaged_records_make_a_run_a_failed_one(tmp_path):
    """Its reason is what cannot be read, nothing is learnt from it, and the other runs are not disturbed."""
    cell = make_cell(tmp_path, 0.1)
    leave(cell, 10, "finished")
    cell.directory.metrics.write_text("not,a,record\n")
    state = read_state(cell)
    assert (state.status, state.epochs, state.has_ended) == ("failed", 0, False)
    assert "expected the header of metrics.csv" in str(state.failure)
    assert Estimator([cell], {BASELINE: FirstSteps(1.0)}).seconds(cell, state) == pytest.approx(num_steps(cell.config))
    cell.directory.info.write_text("{")
    assert "run.json is not valid JSON" in str(read_state(cell).failure)


def test_a_finished_run_that_lacks_epochs_is_a_failed_one(tmp_path):
    """Means over fewer epochs than were trained would be wrong numbers."""
    cell = make_cell(tmp_path, 0.1)
    leave(cell, 9, "finished")
    assert "says that the run has finished, but metrics.csv lacks epochs" in str(read_state(cell).failure)
    assert not read_state(cell).has_ended


def test_half_a_run_takes_half_the_time(tmp_path):
    """What a checkpoint has saved is not counted again."""
    cell = make_cell(tmp_path, 0.1)
    estimator = Estimator([], {BASELINE: FirstSteps(1.0)})
    assert estimator.seconds(cell, CellState("running", 5)) == pytest.approx(num_steps(cell.config) / 2)


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(None, "an unknown time"), (45.4, "about 45 s"), (600, "about 10 min"), (9000, "about 2.5 h")],
)
def test_durations_are_said_in_fitting_units(seconds, expected):
    """Seconds, minutes or hours, never more digits than are known."""
    assert shown_seconds(seconds) == expected


def test_lines_count_what_is_done_diverged_and_failed(tmp_path, capsys):
    """Without a terminal there is one line per run, with the state of all."""
    cells = [make_cell(tmp_path, lr) for lr in (0.1, 0.2, 0.3, 0.4)]
    leave(cells[0], 10, "finished")
    progress = CampaignProgress("grid", cells, Estimator(cells, {}), jobs=2)
    leave(cells[1], 3, "diverged")
    progress.end(cells[1], None)
    progress.end(cells[2], "no memory")
    progress.close()
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("[2/4] grid panel/baseline lr=0.2 seed=0: diverged after epoch 3 [2 of 4 done, ")
    assert "1 diverged" in first
    assert "left" in first
    assert second.startswith("[2/4] grid panel/baseline lr=0.3 seed=0: failed: no memory")
    assert "1 diverged, 1 failed" in second


def test_a_finished_run_is_told_with_its_numbers(tmp_path, capsys):
    """The last training loss, the best validation error and the seconds."""
    cell = make_cell(tmp_path, 0.1)
    progress = CampaignProgress("grid", [cell], Estimator([cell], {}), jobs=1)
    leave(cell, 10, "finished")
    progress.end(cell, None)
    progress.close()
    assert "train loss 0.200, best val error 6.0%, 250 s" in capsys.readouterr().out
    assert read_state(cell) == CellState("finished", 10)
