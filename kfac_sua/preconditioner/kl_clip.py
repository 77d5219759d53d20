"""KL clip: a step that is too long in the Fisher metric is shortened.

The step −lr·u, with u the preconditioned and g the plain gradient, changes the model's predictions by a KL divergence
of about ½ lr² uᵀFu ≤ ½ lr² g·u, as (F + damping) u = g. All preconditioned gradients are multiplied by

    min(1, √(κ / (lr² Σ g·u)))    with the sum over all preconditioned layers (Ba, Grosse & Martens 2017).

- Sum and scale cover the layers that have an inverse. All other parameters (normalisation layers, skipped layers,
  layers before their first refresh) keep their plain gradient: their g·g is not a divergence.
- Gradients are not scaled where the sum is zero, or negative by rounding. If the sum is NaN, all gradients stay as they
  are, so that a check for NaN finds it; if it is infinite, the step becomes zero.
- The momentum of the optimizer is not taken into account: with momentum m steps are up to 1 / (1 − m) times as long.
- Nothing waits for the device.

On our runs (outputs/reference/safety.md) κ = 0.001 rescued trainings with a learning rate 10 or 100 times too large, or
a damping 100 times too small. It took 1 % of a step's time, which is within the noise.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from kfac_sua.preconditioner.plain_numbers import plain_number, shown
from kfac_sua.preconditioner.precision import at_least_float32, on_one_device


def clip_scale(products: Tensor, lr: float | Tensor, kl_clip: float) -> Tensor:
    """Return min(1, √(κ / (lr² Σ g·u))), as a 0-d tensor on the device.

    Args:
        products: g·u of every gradient, in any shape.
        lr: Learning rate of the step, ≥ 0.
        kl_clip: κ > 0.

    Reference: Ba, Grosse & Martens (2017), with g·u as an upper bound of uᵀFu.
    """
    squared_norm = products.sum() * lr**2
    one = torch.ones_like(squared_norm)
    return torch.where(squared_norm > kl_clip, (kl_clip / squared_norm).sqrt(), one)


class KLClip:
    """Clips one step.

    Reference: Ba, Grosse & Martens (2017), see :func:`clip_scale`.

    Args:
        kl_clip: κ > 0.
        lr: Learning rate of the step.

    Raises:
        ValueError: If the learning rate is missing, negative or not finite (the value of a tensor is not checked, as
            that would wait for the device).
    """

    def __init__(self, kl_clip: float, lr: float | Tensor | None) -> None:
        self._kl_clip = kl_clip
        self._lr = _checked_lr(lr, kl_clip)
        self._grads: list[Tensor] = []
        self._products: list[Tensor] = []

    @contextmanager
    def measuring(self, grads: Sequence[Tensor]) -> Iterator[None]:
        """Add g·u of gradients that are preconditioned inside, in place."""
        plain = [at_least_float32(grad).clone() for grad in grads]
        yield
        self._products += [before.mul_(after).sum() for before, after in zip(plain, grads, strict=True)]
        self._grads += grads

    def scale_(self) -> Tensor | None:
        """Multiply all measured gradients by :func:`clip_scale`.

        Returns:
            The scale, a 0-d tensor; ``None`` if there were no gradients.
        """
        if not self._grads:
            return None
        products = torch.stack(on_one_device(self._products))  # [gradients]
        scale = clip_scale(products, self._lr, self._kl_clip)
        for grad in self._grads:
            grad.mul_(scale.to(grad.device))
        return scale


def _checked_lr(lr: float | Tensor | None, kl_clip: float) -> float | Tensor:
    if lr is None:
        raise ValueError(
            f'kl_clip={kl_clip:g} needs the learning rate of every step: call step(lr=optimizer.param_groups[0]["lr"]).'
        )
    if isinstance(lr, Tensor) and lr.numel() == 1 and not lr.is_complex():
        return lr.reshape(())  # []
    number = plain_number(lr)
    if number is None:
        raise ValueError(
            f"lr must be the learning rate of the step, a number >= 0 or a tensor of one, got {shown(lr)}."
        )
    if not 0 <= number <= sys.float_info.max:
        raise ValueError(f"lr must be the learning rate of the step, a finite number >= 0, got {number}.")
    return number
