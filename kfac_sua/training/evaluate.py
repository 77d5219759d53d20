"""Loss and misclassification rate over an image set."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac_sua.config import Precision
from kfac_sua.preconditioner.checkpoint.checks import outlined
from kfac_sua.training.precision import compute_logits
from kfac_sua.training.process_group import ProcessGroup


@dataclass(frozen=True)
class Evaluation:
    """Mean loss in nats and misclassification rate in [0, 1]."""

    loss: float
    error: float


class ErrorCounter:
    """Sums losses and errors over mini-batches on the device, so that the host waits only for the result.

    Each of several processes adds its own part. Results are over all processes, and all have to ask for them. The sums
    are changed in place, as captured steps add to them.

    Args:
        device: Device of the logits that will come.
        process_group: The processes.
    """

    def __init__(self, device: torch.device, process_group: ProcessGroup | None = None) -> None:
        self._process_group = process_group or ProcessGroup()
        self._loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        self._num_errors = torch.zeros((), dtype=torch.int64, device=device)
        self._num_images = torch.zeros((), dtype=torch.int64, device=device)

    @torch.no_grad()
    def add(self, logits: Tensor, labels: Tensor, loss: Tensor) -> None:
        """Add one mini-batch.

        Args:
            logits: Scores, ``[batch, classes]``.
            labels: True classes, ``[batch]``, int64.
            loss: Mean loss of the mini-batch.
        """
        self._loss_sum += loss.double() * len(labels)
        self._num_errors += (logits.argmax(1) != labels).sum()
        self._num_images += len(labels)

    def reset(self) -> None:
        """Begin again from zero."""
        for value in (self._loss_sum, self._num_errors, self._num_images):
            value.zero_()

    @property
    def own_loss_sum(self) -> Tensor:
        """The sum of this process's losses on the device, ``[]`` in float64; later mini-batches change it in place."""
        return self._loss_sum

    def loss_sum(self) -> Tensor:
        """Return the sum of all losses so far, on the device, ``[]`` in float64."""
        return self._process_group.all_reduce_sum(self._loss_sum)

    def result(self) -> Evaluation:
        """Return the means over all images, NaN without images; waits for the device."""
        loss_sum, num_errors, num_images = self._totals()
        if num_images == 0:
            return Evaluation(math.nan, math.nan)
        return Evaluation(loss_sum.item() / num_images, num_errors.item() / num_images)

    def state_dict(self) -> dict[str, Any]:
        """Return the sums, for a checkpoint."""
        loss_sum, num_errors, num_images = self._totals()
        return {"loss_sum": loss_sum, "num_errors": num_errors, "num_images": num_images}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the sums of an earlier attempt; each process takes a share.

        Raises:
            ValueError: If the state is not valid; nothing is changed then.
        """
        sums = checked_sums(state)
        for own, total in zip((self._loss_sum, self._num_errors, self._num_images), sums, strict=True):
            own.copy_(self._process_group.share_of(total))

    def _totals(self) -> tuple[Tensor, Tensor, int]:
        """Return the sums over all processes."""
        # Counts of images are whole numbers far below 2**53, which float64 holds exactly.
        own = torch.stack([self._loss_sum, self._num_errors.double(), self._num_images.double()])  # [3]
        loss_sum, num_errors, num_images = self._process_group.all_reduce_sum(own).unbind()
        return loss_sum, num_errors.long(), int(num_images)


def checked_sums(state: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the sum of losses, the number of errors and the number of images of a counter's state.

    The loss may be infinite or NaN: divergence is noticed a few steps late.

    Args:
        state: What :meth:`ErrorCounter.state_dict` returned.

    Raises:
        ValueError: If an entry is missing, is not a number of its type, or is negative.
    """
    names = ("loss_sum", "num_errors", "num_images")
    if not isinstance(state, Mapping) or set(state) != set(names):
        raise ValueError(f"sums is {outlined(state)}, expected a mapping of {', '.join(names)}")
    for name in names:
        value, is_loss = state[name], name == "loss_sum"
        is_own = isinstance(value, Tensor) and value.ndim == 0 and not value.is_meta
        is_whole = (type(value) is int and value < 2**63) or (is_own and value.dtype == torch.int64)
        if not (is_own and value.dtype == torch.float64 if is_loss else is_whole) or value < 0:
            kind = "a sum of losses in float64" if is_loss else "a whole number"
            raise ValueError(f"sums.{name} is {value.item() if is_own else outlined(value)}, expected {kind} ≥ 0")
    loss_sum, num_errors, num_images = (torch.as_tensor(state[name]) for name in names)
    return loss_sum, num_errors, num_images


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    device: torch.device,
    after_batch: Callable[[], None] = lambda: None,
    process_group: ProcessGroup | None = None,
    precision: Precision = Precision.float32,
) -> Evaluation:
    """Return loss and error of a model in evaluation mode; its mode is restored at the end.

    Args:
        model: The network.
        batches: Inputs and labels. Mini-batches may differ in size; every image has the same weight.
        device: Device of model and batches.
        after_batch: Called after each mini-batch; it may raise.
        process_group: The processes, each with its part of every mini-batch, which may be empty.
        precision: Precision of convolutions and matrix products.

    Returns:
        Means over all images.
    """
    was_training = model.training
    model.eval()
    counter = ErrorCounter(device, process_group)
    try:
        for inputs, labels in batches:
            if len(inputs):
                logits = compute_logits(model, inputs, precision)
                counter.add(logits, labels, F.cross_entropy(logits, labels))
            after_batch()
    finally:
        model.train(was_training)
    return counter.result()
