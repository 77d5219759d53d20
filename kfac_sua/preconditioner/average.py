"""Bias-corrected running average of a layer's factors."""

from dataclasses import dataclass

import torch

from kfac_sua.preconditioner.factors import Factor
from kfac_sua.preconditioner.statistics import LayerFactors


@dataclass
class RunningAverage:
    """Exponential average of measured factors, started from zero and corrected for it; no identity bias.

    Args:
        decay: Decay per measurement, in [0, 1); 0 keeps the newest measurement alone, with its rows.
        value: The uncorrected average; ``None`` before the first measurement.
        weight: Sum of the weights in it: 1 − decayᵏ after k measurements.
    """

    decay: float
    value: LayerFactors | None = None
    weight: float = 0.0

    def update(self, new: LayerFactors) -> None:
        """Take in a measurement."""
        self.weight = self.decay * self.weight + 1 - self.decay
        if self.decay == 0:
            self.value = new
            return
        old = self.value
        self.value = LayerFactors(
            activation=self._blend(old.activation if old else None, new.activation),
            gradient=self._blend(old.gradient if old else None, new.gradient),
            scale=new.scale,
        )

    def corrected(self) -> LayerFactors:
        """Return the average divided by the weights in it."""
        assert self.value is not None, "no measurement yet"
        if self.decay == 0:
            return self.value
        value = self.value
        return LayerFactors(
            activation=Factor(blocks=value.activation.dense() / self.weight),
            gradient=Factor(blocks=value.gradient.dense() / self.weight),
            scale=value.scale,
        )

    def _blend(self, old: Factor | None, new: Factor) -> Factor:
        dense = new.dense()
        if old is None:
            return Factor(blocks=dense * (1 - self.decay))
        kept = old.dense().to(dense)
        return Factor(blocks=torch.lerp(dense, kept, self.decay, out=kept))  # in place: no second copy of the average
