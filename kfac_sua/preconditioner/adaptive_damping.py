"""Adaptive damping: the Levenberg-Marquardt rule on the reduction ratio (Martens & Grosse 2015, Sec. 6.5).

Every T steps the change of the loss on the step's own mini-batch is compared with the change that the quadratic model
predicts, ρ = (loss(θ + s) − loss(θ)) / (g·s + ½ sᵀFs). If ρ is large, the model is accurate over longer steps too, and
the damping is multiplied by ω^T; if ρ is small, it is divided by ω^T.

The terms of the prediction:

- s is the step that the optimizer took, including momentum, weight decay and clipping, and g the plain gradient.
- F is made of the *undamped* Kronecker factors of the last refresh, so that ρ = 1 where the quadratic model is exact.
  Martens & Grosse take the exact Fisher of the mini-batch instead, which costs two more passes, and include the
  damping.
- F is block-diagonal. Parameters outside the preconditioned layers contribute to g·s only.

The rule was made for steps to the minimiser of the model, s = −u. Ordinary training multiplies these by a learning rate
far below 1. Along such a short step the model is nearly linear and ρ is near 1 at any damping, so that the damping
falls until lr·u is as long as a step can be. On our runs (outputs/reference/safety.md) that made training worse at a
tuned learning rate of 0.01, and better where the damping had been far too large or the learning rate was 1 without
momentum.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kfac_sua.preconditioner.checkpoint.checks import RESTART, checked_entries, is_count, outlined
from kfac_sua.preconditioner.kfac import KroneckerPreconditioner
from kfac_sua.preconditioner.plain_numbers import checked_integer, checked_number, plain_number, shown
from kfac_sua.preconditioner.precision import on_one_device
from kfac_sua.preconditioner.settings import LossReduction


class AdaptiveDamping:
    """Adapts a preconditioner's damping to how well its quadratic model predicts the loss.

    Reference: Martens & Grosse (2015), Sec. 6.5; the differences are listed at the top of this module.

    Around an ordinary loop::

        adaptive = AdaptiveDamping(preconditioner)
        for inputs, labels in batches:
            optimizer.zero_grad()
            loss = loss_function(model(inputs), labels)
            loss.backward()
            preconditioner.step()
            optimizer.step()
            if adaptive.is_due:
                with adaptive.measuring():
                    loss_after = loss_function(model(inputs), labels)
                adaptive.update(loss, loss_after)

    One step in ``period`` is due. It costs an additional forward pass, a product of the step with the factors (as much
    as one application of the inverses), copies of the model's parameters and gradients until :meth:`update`, and one
    wait for the device; ``application="auto"`` applies inverses to the weight gradient in that step. The factors of the
    last refresh stay in memory, and in the state of the preconditioner.

    The new damping takes effect at the next refresh. It is part of the preconditioner's state; this object's own state
    holds its counts only. To continue a run, make this object again before the first step.

    Limits: the loss must be a mean over examples. Dropout draws other masks in the additional pass, which adds noise to
    ρ. Under ``GradScaler`` pass the loss without its scale, as the gradient has been unscaled by then.

    Args:
        preconditioner: Made with a number as ``damping``.
        period: Number of steps T from one that is due to the next, ≥ 1. The default is that of Martens & Grosse.
        decay: ω in (0, 1); the damping is multiplied or divided by ω^T. The default is that of Martens & Grosse.
        thresholds: ρ below the first raises the damping, ρ above the second lowers it. The defaults are those of
            Martens & Grosse.
        bounds: Least and largest damping. The defaults only stop a damping that moves without end.

    Raises:
        ValueError: If a value is out of range, the damping is outside the bounds or a function of the step, or the loss
            is a sum over examples.
    """

    def __init__(
        self,
        preconditioner: KroneckerPreconditioner,
        *,
        period: int = 5,
        decay: float = 19 / 20,
        thresholds: tuple[float, float] = (0.25, 0.75),
        bounds: tuple[float, float] = (1e-6, 100.0),
    ) -> None:
        period, decay = checked_integer("period", period), checked_number("decay", decay)
        thresholds, bounds = _checked_pair("thresholds", thresholds), _checked_pair("bounds", bounds)
        _validate(preconditioner, period, decay, thresholds, bounds)
        preconditioner.damping = preconditioner.damping  # refused if it is a function of the step
        self._preconditioner = preconditioner
        self._period = period
        self._factor = decay**period
        self._thresholds = thresholds
        self._bounds = bounds
        self._before: dict[nn.Parameter, tuple[Tensor, Tensor]] = {}
        self.reduction_ratio: float | None = None
        self.num_lowered = self.num_raised = 0
        preconditioner.observe_gradients(self)

    @property
    def bounds(self) -> tuple[float, float]:
        """Least and largest damping."""
        return self._bounds

    @property
    def is_due(self) -> bool:
        """Whether :meth:`update` is to judge the step that was just taken."""
        return bool(self._before)

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Run the forward pass after the step inside, without gradients or statistics, and restore buffers afterwards.

        The running averages of batch normalisation thus see the mini-batch only once.
        """
        model = self._preconditioner.model
        buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
        try:
            with torch.no_grad(), self._preconditioner.paused():
                yield
        finally:
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)

    @torch.no_grad()
    def update(self, loss_before: Tensor | float, loss_after: Tensor | float) -> float | None:
        """Judge the step that was just taken, and set the damping for the next refresh.

        Where processes share a mini-batch, all must call it; their losses are averaged, so that all decide the same.

        Args:
            loss_before: Loss of the mini-batch that the step was computed from, before the step.
            loss_after: Its loss after the step.

        Returns:
            The reduction ratio ρ; ``None`` where the model predicts no reduction. The damping then stays as it is, or
            is raised if the loss rose.

        Raises:
            RuntimeError: If no step is waiting to be judged, see :attr:`is_due`.
        """
        if not self.is_due:
            raise RuntimeError("update() has no step to judge: call it after a step for which is_due holds, once.")
        predicted = self._predicted_change()
        values = torch.stack(  # [3]
            [torch.as_tensor(value).to(predicted) for value in (loss_before, loss_after, predicted)]
        )
        processes = self._preconditioner.processes
        before, after, change = (values if processes is None else processes.mean(values)).tolist()
        self._before = {}
        self.reduction_ratio = reduction_ratio(after - before, change)
        self._move(direction(after - before, change, self._thresholds))
        return self.reduction_ratio

    def state_dict(self) -> dict[str, Any]:
        """Return the last ratio and the counts; the damping is part of the preconditioner's state."""
        return {
            "reduction_ratio": self.reduction_ratio,
            "num_lowered": self.num_lowered,
            "num_raised": self.num_raised,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`.

        Raises:
            ValueError: If it is not such a state; nothing is changed then.
        """
        ratio, *counts = checked_entries(state, ("reduction_ratio", "num_lowered", "num_raised"), "AdaptiveDamping")
        if ratio is not None and not isinstance(ratio, float):  # NaN is valid: a loss was not finite
            raise ValueError(
                f"AdaptiveDamping state: reduction_ratio must be a float or none, got {outlined(ratio)}; {RESTART}."
            )
        for name, count in zip(("num_lowered", "num_raised"), counts, strict=True):
            if not is_count(count):
                raise ValueError(
                    f"AdaptiveDamping state: {name} must be a whole number >= 0, got {outlined(count)}; {RESTART}."
                )
        self.reduction_ratio = ratio
        self.num_lowered, self.num_raised = counts

    # --- called by the preconditioner -------------------------------------------------------------------------------

    def wants(self, step: int) -> bool:
        """Whether :meth:`observe` is to be called in this step, counted from 0."""
        return step % self._period == 0

    def observe(self) -> None:
        """Copy parameters and plain gradients, if the factors of all layers are in memory."""
        layers = self._preconditioner.layers
        if all(layer.factors is not None or layer.inverse is None for layer in layers):
            self._before = {
                parameter: (parameter.detach().clone(), parameter.grad.clone())
                for parameter in self._preconditioner.model.parameters()
                if parameter.grad is not None
            }

    def forget(self) -> None:
        """Forget a step that was never judged."""
        self._before = {}

    # --- inside -----------------------------------------------------------------------------------------------------

    def _predicted_change(self) -> Tensor:
        """Return g·s + ½ sᵀFs in float64, a 0-d tensor."""
        steps = {parameter: parameter.detach() - value for parameter, (value, _) in self._before.items()}
        parts = [(grad * steps[parameter]).sum().double() for parameter, (_, grad) in self._before.items()]
        for layer in self._preconditioner.layers:
            if layer.factors is not None and layer.weight in steps:
                bias = None if layer.bias is None else steps.get(layer.bias)
                curvature = layer.structure.quadratic_form(steps[layer.weight], bias, layer.factors)
                parts.append(curvature.double() / 2)
        return torch.stack(on_one_device(parts)).sum()  # the sum of [parameters and layers]

    def _move(self, direction: int) -> None:
        preconditioner, (least, largest) = self._preconditioner, self._bounds
        damping = preconditioner.damping * self._factor**-direction
        preconditioner.damping = min(max(damping, least), largest)
        self.num_raised += direction > 0
        self.num_lowered += direction < 0


def reduction_ratio(change: float, predicted: float) -> float | None:
    """Return the change of the loss divided by the predicted change; ``None`` unless a reduction is predicted.

    Reference: ρ of Martens & Grosse (2015), Sec. 6.5.
    """
    return change / predicted if predicted < 0 else None


def direction(change: float, predicted: float, thresholds: tuple[float, float]) -> int:
    """Return how the damping moves: 1 up, −1 down, 0 not at all.

    A loss that is not finite raises the damping. If the model predicts no reduction, ρ is not a measure of the model
    (momentum may point against the gradient of one mini-batch); the damping rises only if the loss rose as well.

    Reference: Martens & Grosse (2015), Sec. 6.5; the case without a predicted reduction is this project's.

    Args:
        change: Change of the loss.
        predicted: Change of the loss that the model predicts.
        thresholds: Thresholds of the ratio, see :class:`AdaptiveDamping`.
    """
    ratio = reduction_ratio(change, predicted)
    if ratio is None:
        return 1 if not change <= 0 else 0
    if not ratio >= thresholds[0]:
        return 1
    return -1 if ratio > thresholds[1] else 0


def _checked_pair(name: str, values: Iterable[object]) -> tuple[float, float]:
    """Return two numbers as Python's ``int`` or ``float``; raise ``ValueError`` if there are not two numbers."""
    is_one = isinstance(values, str) or plain_number(values) is not None
    if is_one or not isinstance(values, Iterable) or len(pair := tuple(values)) != 2:
        raise ValueError(f"{name} must be two numbers, got {shown(values)}.")
    first, second = (checked_number(f"each of {name}", value) for value in pair)
    return first, second


def _validate(
    preconditioner: KroneckerPreconditioner,
    period: int,
    decay: float,
    thresholds: tuple[float, float],
    bounds: tuple[float, float],
) -> None:
    if period < 1:
        raise ValueError(f"period must be >= 1 step, got {period}.")
    if not 0 < decay < 1:
        raise ValueError(f"decay must be in (0, 1), got {decay}.")
    if not thresholds[0] < thresholds[1]:
        raise ValueError(f"thresholds must be increasing, got {thresholds}.")
    if not 0 < bounds[0] < bounds[1]:
        raise ValueError(f"bounds must be increasing and > 0, got {bounds}.")
    if not bounds[0] <= preconditioner.damping <= bounds[1]:
        raise ValueError(
            f"damping={preconditioner.damping:g} is outside of the bounds {bounds[0]:g} to {bounds[1]:g} that adaptive "
            f"damping keeps to; start within them."
        )
    if preconditioner.settings.loss_reduction is LossReduction.sum:
        raise ValueError("loss_reduction=sum scales loss and Fisher differently; adaptive damping needs a mean loss.")
