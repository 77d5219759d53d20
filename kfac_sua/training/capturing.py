"""Which runs capture their plain steps as CUDA graphs, and why others do not."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

from kfac_sua.config import ConfigError, NonFinite
from kfac_sua.preconditioner import CapturedStep
from kfac_sua.training.step import take_step, take_step_if_finite

if TYPE_CHECKING:
    from kfac_sua.training.state import Training

DEVICES = ("cuda",)
"""Types of devices on which steps are captured."""


def training_step(training: Training) -> Callable[[], None]:
    """Return what takes one step of a run: by a replay, if its plain steps are to be captured and can be.

    Args:
        training: The state that it changes in place.

    Raises:
        ConfigError: If ``capture=true`` and they cannot be.
    """
    config = training.config
    policy = take_step_if_finite if config.non_finite is NonFinite.skip else take_step
    step = functools.partial(policy, training)
    if config.capture is False:
        return step
    reason = why_eager(training)
    if not reason:
        return CapturedStep(step, training.model, training.optimizer, training.preconditioner)
    if config.capture is True:
        raise ConfigError(f"capture=true, but {reason}; give capture=auto or capture=false.")
    if training.device.type in DEVICES:
        training.world.say(f"steps are not captured: {reason}")
    return step


def why_eager(training: Training) -> str:
    """Return why no step of a run can be captured, in a clause; empty if plain ones can be, by the configuration."""
    if training.device.type not in DEVICES:
        return f"device={training.device.type} has no CUDA graphs"
    if training.config.non_finite is NonFinite.skip:
        return "non_finite=skip decides on the host whether to take each step"
    if training.world.size > 1:
        return f"{training.world.size} processes share every mini-batch, and their communication is not captured"
    return ""


def is_capturing(step: Callable[[], None]) -> bool:
    """Whether a step's plain ones are replayed, or will be."""
    return isinstance(step, CapturedStep) and not step.why_eager


def check_captured(training: Training) -> None:
    """Raise if ``capture=true`` and the steps have turned out not to be capturable.

    Raises:
        RuntimeError: With the reason, which ``capture=auto`` puts into a warning.
    """
    step = training.take_step
    if training.config.capture is True and isinstance(step, CapturedStep) and step.why_eager:
        raise RuntimeError(f"capture=true, but {step.why_eager}; give capture=auto or capture=false.")
