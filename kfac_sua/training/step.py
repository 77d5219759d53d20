"""One mini-batch: forward, backward, preconditioner, optimizer; and what to do if something in it is not finite."""

import math

import torch.nn.functional as F
from torch import Tensor, nn

from kfac_sua.config import NonFinite
from kfac_sua.training.damping import adapt_damping
from kfac_sua.training.precision import compute_logits
from kfac_sua.training.state import Training

# Steps between looks at whether the loss is still finite: each look waits for the device.
DIVERGENCE_CHECK_PERIOD = 50


def take_step(training: Training, inputs: Tensor, labels: Tensor) -> bool:
    """Take one optimisation step, or skip it.

    With ``non_finite=stop``, the loss is looked at now and then; with ``skip``, loss and gradient at every mini-batch,
    which waits for the device.

    Args:
        training: The state, changed in place.
        inputs: Images of the mini-batch.
        labels: Their classes.

    Returns:
        False if the loss was seen not to be finite and the run must end as diverged.
    """
    weight = training.loss_weight(len(labels))
    may_skip = training.config.non_finite is NonFinite.skip
    buffers = [(buffer, buffer.clone()) for buffer in training.model.buffers()] if may_skip else []
    with training.watch.phase("forward_backward"):
        logits = compute_logits(training.forward, inputs, training.config.precision)
        loss = F.cross_entropy(logits, labels)
    if not may_skip:
        training.sums.add(logits, labels, loss)
        if check_is_due(training) and not training.sums.is_finite():
            return False
    with training.watch.phase("forward_backward"):
        training.optimizer.zero_grad(set_to_none=True)
        if training.preconditioner is not None:
            training.preconditioner.fisher_backward(logits)
        (loss if weight == 1 else loss * weight).backward()
    if may_skip:
        if training.world.any(not _is_finite(loss, training.model)):
            _skip(training, buffers)
            return True
        training.sums.add(logits, labels, loss)
    _update(training, weight)
    adapt_damping(training, inputs, labels, loss, weight)
    return True


def _update(training: Training, loss_weight: float) -> None:
    if training.preconditioner is not None:
        with training.watch.phase("application"):
            lr = training.optimizer.param_groups[0]["lr"]
            training.preconditioner.step(loss_weight=loss_weight, lr=lr)
    with training.watch.phase("optimizer"):
        training.optimizer.step()
    training.step += 1


def _skip(training: Training, buffers: list[tuple[Tensor, Tensor]]) -> None:
    """Leave everything as it was before the mini-batch, the statistics of batch normalisation included."""
    training.optimizer.zero_grad(set_to_none=True)
    for buffer, before in buffers:
        buffer.copy_(before)
    if training.preconditioner is not None:
        training.preconditioner.discard()
    training.skipped_steps += 1


def _is_finite(loss: Tensor, model: nn.Module) -> bool:
    """Say whether the loss, the gradient and the statistics of batch normalisation are; waits for the device once.

    An activation that overflows may leave a finite loss behind, but an infinite running variance.
    """
    tensors = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    tensors += [buffer for buffer in model.buffers() if buffer.is_floating_point()]
    return bool((loss.detach() + nn.utils.get_total_norm(tensors, norm_type=math.inf)).isfinite())


def check_is_due(training: Training) -> bool:
    """Look at the loss now and then, and always before statistics: those of NaN would be dropped."""
    preconditioner = training.preconditioner
    is_measuring = preconditioner is not None and preconditioner.statistics_due
    return is_measuring or training.step % DIVERGENCE_CHECK_PERIOD == 0
