"""Learning-rate schedules against values computed by hand."""

import pytest

from kfac_sua.config import ScheduleConfig, ScheduleName, StepScheduleConfig
from kfac_sua.training.schedule import learning_rate


def rates(schedule: ScheduleConfig, epochs: int) -> list[float]:
    """Return the learning rate of every epoch, from a base of 0.8."""
    return [learning_rate(schedule, 0.8, epoch, epochs) for epoch in range(epochs)]


def test_constant_stays():
    """A constant schedule returns the base learning rate in every epoch."""
    assert rates(ScheduleConfig(name=ScheduleName.constant), 3) == [0.8, 0.8, 0.8]


def test_step_decays_after_each_milestone():
    """With milestones 2 and 3, two epochs have the full rate, one a half, the rest a quarter."""
    schedule = StepScheduleConfig(name=ScheduleName.step, milestones=[2, 3], gamma=0.5)
    assert rates(schedule, 5) == [0.8, 0.8, 0.4, 0.2, 0.2]


def test_step_without_milestones_is_constant():
    """No milestone, no decay."""
    schedule = StepScheduleConfig(name=ScheduleName.step, milestones=[], gamma=0.5)
    assert rates(schedule, 2) == [0.8, 0.8]


def test_cosine_at_quarters():
    """Over four epochs the half cosine takes the values (1 + cos(kπ/4))/2."""
    expected = [0.8, 0.8 * 0.8535533905932737, 0.4, 0.8 * 0.1464466094067263]
    assert rates(ScheduleConfig(name=ScheduleName.cosine), 4) == pytest.approx(expected, rel=1e-12)
