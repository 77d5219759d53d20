"""Schedules of learning rate and damping against values computed by hand."""

import pytest
from tiny_runs import tiny_config

from kfac_sua.config import ScheduleConfig, ScheduleName, StepScheduleConfig
from kfac_sua.training.schedule import learning_rate, milestone_epoch, scheduled_damping


def rates(schedule: ScheduleConfig, epochs: int) -> list[float]:
    """Return the learning rate of every epoch, from a base of 0.8."""
    return [learning_rate(schedule, 0.8, epoch, epochs) for epoch in range(epochs)]


def test_constant_stays():
    """A constant schedule returns the base learning rate in every epoch."""
    assert rates(ScheduleConfig(name=ScheduleName.constant), 3) == [0.8, 0.8, 0.8]


def test_step_decays_after_each_milestone():
    """With milestones at 2/5 and 3/5 of 5 epochs, two have the full rate, one a half, the rest a quarter."""
    schedule = StepScheduleConfig(name=ScheduleName.step, milestones=[0.4, 0.6], gamma=0.5)
    assert rates(schedule, 5) == [0.8, 0.8, 0.4, 0.2, 0.2]


def test_step_without_milestones_is_constant():
    """No milestone, no decay."""
    schedule = StepScheduleConfig(name=ScheduleName.step, milestones=[], gamma=0.5)
    assert rates(schedule, 2) == [0.8, 0.8]


def test_cosine_at_quarters():
    """Over four epochs the half cosine takes the values (1 + cos(kπ/4))/2."""
    expected = [0.8, 0.8 * 0.8535533905932737, 0.4, 0.8 * 0.1464466094067263]
    assert rates(ScheduleConfig(name=ScheduleName.cosine), 4) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("fraction", "epochs", "expected"),
    [
        (0.5, 10, 5),
        (0.8, 10, 8),
        (0.1, 30, 3),  # 0.1 * 30 = 3.0000000000000004
        (0.07, 100, 7),  # 0.07 * 100 = 7.000000000000001
        (0.29, 100, 29),  # 0.29 * 100 = 28.999999999999996
        (2 / 3, 3, 2),
        (1 / 3, 9, 3),
        (0.5, 5, 3),  # rounded up
        (0.01, 10, 1),
        (0.8, 2, 2),  # the end of the run
        (0.5, 1, 1),
        (1e-07, 10, 1),  # written with an exponent
    ],
)
def test_milestone_is_exact(fraction, epochs, expected):
    """A milestone is the fraction of the epochs, rounded up, without errors of floating point."""
    assert milestone_epoch(fraction, epochs) == expected


def test_every_hundredth_of_every_length_is_exact():
    """Against integer arithmetic: p percent of n epochs is ⌈p·n/100⌉ for all p and all n up to 300."""
    for percent in range(1, 100):
        for epochs in range(1, 301):
            assert milestone_epoch(float(f"0.{percent:02d}"), epochs) == -(-percent * epochs // 100)


def test_step_keeps_its_shape_when_the_run_is_scaled():
    """The default milestones of a run ten times as long lie at ten times the epochs."""
    schedule = StepScheduleConfig(name=ScheduleName.step, milestones=[0.5, 0.8], gamma=0.1)
    assert rates(schedule, 10) == [0.8] * 5 + [0.8 * 0.1] * 3 + [0.8 * 0.1**2] * 2
    assert rates(schedule, 100)[::10] == rates(schedule, 10)


def test_step_of_a_single_epoch_never_decays():
    """Milestones are passed between epochs, so a run of one epoch has none."""
    assert rates(StepScheduleConfig(name=ScheduleName.step, milestones=[0.5, 0.8], gamma=0.1), 1) == [0.8]


@pytest.mark.parametrize("final", [0.001, 10.0])
def test_damping_reaches_its_last_value_in_the_last_epoch(tmp_path, final):
    """From 0.1 it falls or rises by equal factors: three epochs see the ends and their geometric mean."""
    config = tiny_config(tmp_path, f"preconditioner.damping_final={final}", "epochs=3").preconditioner
    dampings = [scheduled_damping(config, epoch, 3) for epoch in range(3)]
    assert dampings == pytest.approx([0.1, (0.1 * final) ** 0.5, final], rel=1e-12)
    assert dampings[2] == final


def test_without_a_last_value_nobody_sets_the_damping(tmp_path):
    """So that whatever else sets it is left alone."""
    assert scheduled_damping(tiny_config(tmp_path).preconditioner, 1, 3) is None
