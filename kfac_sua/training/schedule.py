"""Learning rate and damping as pure functions of the epoch, so that checkpoints need no scheduler state."""

import math
from fractions import Fraction

from kfac_sua.config import KroneckerConfig, ScheduleConfig, ScheduleName, StepScheduleConfig
from kfac_sua.preconditioner import exponential_damping


def learning_rate(schedule: ScheduleConfig, base_lr: float, epoch: int, epochs: int) -> float:
    """Return the learning rate of one epoch, constant within it.

    ``step`` multiplies by ``gamma`` once per milestone passed (see :func:`milestone_epoch`); ``cosine`` is
    base_lr · (1 + cos(π·epoch/epochs))/2, which would reach zero in the epoch after the last.

    Args:
        schedule: Which schedule, with its settings.
        base_lr: Learning rate of the first epoch.
        epoch: Epochs already completed, from 0 to ``epochs - 1``.
        epochs: Length of the run.

    Returns:
        The learning rate.
    """
    if isinstance(schedule, StepScheduleConfig):
        return base_lr * schedule.gamma ** sum(epoch >= milestone_epoch(at, epochs) for at in schedule.milestones)
    if schedule.name is ScheduleName.cosine:
        return base_lr * (1 + math.cos(math.pi * epoch / epochs)) / 2
    return base_lr


def scheduled_damping(config: KroneckerConfig, epoch: int, epochs: int) -> float | None:
    """Return the damping of one epoch, constant within it: from ``damping`` in the first to ``damping_final``.

    Args:
        config: The preconditioner.
        epoch: Epochs already completed, from 0 to ``epochs - 1``.
        epochs: Length of the run, ≥ 2 if there is a ``damping_final``.

    Returns:
        The damping; ``None`` if it does not follow a schedule.
    """
    if config.damping_final is None:
        return None
    return exponential_damping(config.damping, config.damping_final, epochs - 1)(epoch)


def milestone_epoch(fraction: float, epochs: int) -> int:
    """Return after how many epochs a fraction of the run has passed, ⌈fraction · epochs⌉.

    The fraction is taken as the decimal number that was written: 0.1 of 30 epochs is 3, where floating point gives
    3.0000000000000004.

    Args:
        fraction: In (0, 1).
        epochs: Length of the run.

    Returns:
        Completed epochs, from 1 to ``epochs``; at ``epochs`` the run is over.
    """
    return math.ceil(Fraction(repr(fraction)) * epochs)
