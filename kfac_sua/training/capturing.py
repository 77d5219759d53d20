"""Which runs capture their plain steps as CUDA graphs, and why other runs do not."""

import functools
from collections.abc import Callable

import torch

from kfac_sua.config import Config, ConfigError, KroneckerConfig, NonFinite
from kfac_sua.preconditioner import CapturedStep, KroneckerPreconditioner
from kfac_sua.training.state import Training
from kfac_sua.training.step import take_step, take_step_if_finite

DEVICES = ("cuda",)
"""Device types on which steps are captured."""


def build_step(training: Training) -> Callable[[], None]:
    """Return the function that takes one step of a run; it replays plain steps if ``capture`` asks for it and it can.

    Args:
        training: The state that the function changes in place.

    Raises:
        ConfigError: If ``capture=true`` and plain steps cannot be captured.
    """
    config, process_group = training.config, training.process_group
    policy = take_step_if_finite if config.non_finite is NonFinite.skip else take_step
    step = functools.partial(policy, training)
    if config.capture is False:
        return step
    reason = why_no_graphs(training.device) or why_eager(config, training.preconditioner, process_group.size)
    if not reason:
        return CapturedStep(step, training.model, training.optimizer, training.preconditioner)
    if config.capture is True:
        raise ConfigError(f"capture=true, but {reason}; give capture=auto or capture=false.")
    if training.device.type in DEVICES:
        process_group.print_on_main(f"steps are not captured: {reason}")
    return step


def why_no_graphs(device: torch.device) -> str:
    """Return a clause that says why nothing is captured on a device; empty if steps can be captured there."""
    return "" if device.type in DEVICES else f"device={device.type} has no CUDA graphs"


def why_eager(config: Config, preconditioner: KroneckerPreconditioner | None, num_processes: int = 1) -> str:
    """Return a clause that says why no step can be captured, on any device; empty if plain steps can be.

    Args:
        config: The configuration.
        preconditioner: The preconditioner of this configuration; ``None`` for the baseline.
        num_processes: How many processes share a mini-batch.
    """
    if config.non_finite is NonFinite.skip:
        return "non_finite=skip decides on the host whether to take each step"
    if num_processes > 1:
        return f"{num_processes} processes share every mini-batch, and their communication is not captured"
    if preconditioner is not None and preconditioner.factor_period == 1:
        return "every step measures statistics, so that none is plain"
    if isinstance(config.preconditioner, KroneckerConfig) and config.preconditioner.adaptive_damping == 1:
        return "adaptive_damping=1 judges every step, so that none is plain"
    return ""


def outer_phase(training: Training) -> str:
    """Return the phase of a step's time outside its own phases; a replay has no phases of its own."""
    step = training.take_step
    return "captured" if isinstance(step, CapturedStep) and step.is_captured else "other"


def check_captured(training: Training) -> None:
    """Raise if ``capture=true`` and the attempt to capture a step has failed.

    Raises:
        RuntimeError: With the reason; ``capture=auto`` warns of it instead.
    """
    step = training.take_step
    if training.config.capture is True and isinstance(step, CapturedStep) and step.why_eager:
        raise RuntimeError(f"capture=true, but {step.why_eager}; give capture=auto or capture=false.")
