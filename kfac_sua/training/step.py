"""One training step, from the mini-batch to the optimizer, with two policies for losses that are not finite.

A plain step can be captured and replayed: the index of the next mini-batch is on the device, and a step only changes
tensors in place. What a replay cannot do, such as counting on the host, the loop does.
"""

import math

import torch.nn.functional as F
from torch import Tensor, nn

from kfac_sua.training.divergence import Diverged
from kfac_sua.training.precision import compute_logits
from kfac_sua.training.state import Training


def take_step(training: Training) -> None:
    """Take one optimisation step (``non_finite=stop``).

    Args:
        training: The state, changed in place.

    Raises:
        Diverged: If statistics are due and a loss was not finite; the preconditioner would drop statistics of NaN. This
            check waits for the device.
    """
    with training.watch.phase("other"):
        inputs, labels = _next_batch(training)
        logits, loss = _forward(training, inputs, labels)
        training.sums.add(logits, labels, loss)
        if training.statistics_due and not training.sums.loss_sum().isfinite():
            raise Diverged
        _backward(training, logits, loss)
        _precondition(training)
        with training.watch.phase("optimizer"):
            training.optimizer.step()
        adapt_damping(training, inputs, labels, loss)


def take_step_if_finite(training: Training) -> None:
    """Take one optimisation step, or skip it if its loss or gradient is not finite (``non_finite=skip``).

    A skipped mini-batch changes nothing but ``training.skipped_steps``. The check waits for the device at every
    mini-batch.

    Args:
        training: The state, changed in place.
    """
    with training.watch.phase("other"):
        inputs, labels = _next_batch(training)
        buffers = [(buffer, buffer.clone()) for buffer in training.model.buffers()]
        logits, loss = _forward(training, inputs, labels)
        _backward(training, logits, loss)
        if training.process_group.any(not _is_finite(loss, training.model)):
            _skip(training, buffers)
            return
        training.sums.add(logits, labels, loss)
        _precondition(training)
        with training.watch.phase("optimizer"):
            training.optimizer.step()
        adapt_damping(training, inputs, labels, loss)


def adapt_damping(training: Training, inputs: Tensor, labels: Tensor, loss: Tensor) -> None:
    """Compare the step that was just taken with its prediction and adapt the damping, if that is due.

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


def _next_batch(training: Training) -> tuple[Tensor, Tensor]:
    with training.watch.phase("data"):
        return training.loader.next_batch()


def _forward(training: Training, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logits, ``[batch, classes]``, and their mean loss."""
    with training.watch.phase("forward_backward"):
        logits = compute_logits(training.forward, inputs, training.config.precision)
        return logits, F.cross_entropy(logits, labels)


def _backward(training: Training, logits: Tensor, loss: Tensor) -> None:
    weight = training.loss_weight
    with training.watch.phase("forward_backward"):
        training.optimizer.zero_grad(set_to_none=True)
        if training.preconditioner is not None:
            training.preconditioner.fisher_backward(logits)
        (loss if weight == 1 else loss * weight).backward()


def _precondition(training: Training) -> None:
    if training.preconditioner is not None:
        with training.diagnostics.around_preconditioning(), training.watch.phase("application"):
            lr = training.optimizer.param_groups[0]["lr"]
            training.preconditioner.step(loss_weight=training.loss_weight, lr=lr)


def _skip(training: Training, buffers: list[tuple[Tensor, Tensor]]) -> None:
    """Restore the state before the mini-batch, including the statistics of batch normalisation."""
    training.optimizer.zero_grad(set_to_none=True)
    for buffer, before in buffers:
        buffer.copy_(before)
    if training.preconditioner is not None:
        training.preconditioner.discard()
    training.skipped_steps += 1


def _is_finite(loss: Tensor, model: nn.Module) -> bool:
    """Whether loss, gradient and statistics of batch normalisation are finite; waits for the device once.

    An activation that overflows may leave a finite loss but an infinite running variance.
    """
    tensors = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    tensors += [buffer for buffer in model.buffers() if buffer.is_floating_point()]
    return bool((loss.detach() + nn.utils.get_total_norm(tensors, norm_type=math.inf)).isfinite())
