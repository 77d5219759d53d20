"""Learning rate as a pure function of the epoch, so that a resumed run needs no scheduler state."""

import math

from kfac_sua.config import ScheduleConfig, ScheduleName, StepScheduleConfig


def learning_rate(schedule: ScheduleConfig, base_lr: float, epoch: int, epochs: int) -> float:
    """Return the learning rate of one epoch, constant within it.

    ``step`` multiplies by ``gamma`` once per milestone passed; ``cosine`` is base_lr · (1 + cos(π·epoch/epochs))/2,
    which would reach zero in the epoch after the last.

    Args:
        schedule: Which schedule, with its settings.
        base_lr: Learning rate of the first epoch.
        epoch: Epochs already completed, from 0 to ``epochs - 1``.
        epochs: Length of the run.

    Returns:
        The learning rate.
    """
    if isinstance(schedule, StepScheduleConfig):
        return base_lr * schedule.gamma ** sum(epoch >= milestone for milestone in schedule.milestones)
    if schedule.name is ScheduleName.cosine:
        return base_lr * (1 + math.cos(math.pi * epoch / epochs)) / 2
    return base_lr
