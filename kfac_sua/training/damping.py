"""Damping that changes during a run: by its schedule at the start of an epoch, or by how well a step was predicted."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

from kfac_sua.config import KroneckerConfig
from kfac_sua.training.precision import compute_logits
from kfac_sua.training.schedule import scheduled_damping

if TYPE_CHECKING:
    from kfac_sua.training.state import Training


def schedule_damping(training: Training) -> None:
    """Set the damping of the epoch that begins, or goes on, if there is a schedule of it."""
    config = training.config.preconditioner
    if training.preconditioner is None or not isinstance(config, KroneckerConfig):
        return
    damping = scheduled_damping(config, training.epoch, training.config.epochs)
    if damping is not None:
        training.preconditioner.damping = damping


def adapt_damping(training: Training, inputs: Tensor, labels: Tensor, loss: Tensor) -> None:
    """Judge the step that was just taken and adapt the damping, if that is due.

    Args:
        training: The state, changed in place.
        inputs: Images of the step's mini-batch.
        labels: Their classes.
        loss: Their mean loss before the step.
    """
    adaptive, weight = training.adaptive_damping, training.loss_weight
    if adaptive is None or not adaptive.is_due:
        return
    with training.watch.phase("forward_backward"), adaptive.measuring():
        logits = compute_logits(training.model, inputs, training.config.precision)
        loss_after = F.cross_entropy(logits, labels)
    with training.watch.phase("application"):
        adaptive.update(loss * weight, loss_after * weight)
