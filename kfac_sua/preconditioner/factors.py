"""The two factors of a layer, and their bias-corrected running average."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kfac_sua.preconditioner.forms import Factor, factor_from_state, moment_form
from kfac_sua.preconditioner.geometry import LayerGeometry
from kfac_sua.preconditioner.precision import on_one_device


@dataclass
class LayerFactors:
    """Both sides of a layer's Fisher block ``scale · gradient ⊗ activation``, normalised over examples.

    Reference: Grosse & Martens (2016); Laurent et al. (2018), eq. 1 (see ``forms.moments``).

    Args:
        activation: Activation factor Ā.
        gradient: Gradient factor Ḡ.
        scale: S under ``expand``, 1 under ``reduce``.
        num_rows: Rows that they were measured from, by which processes weight their averages; 0 for factors that have
            been averaged over time or read from a checkpoint, which are not weighted any more.
    """

    activation: Factor
    gradient: Factor
    scale: float
    num_rows: int = 0

    def is_finite(self) -> Tensor:
        """Whether no entry is NaN or infinite, as a 0-d bool tensor on the device."""
        return self.activation.traces().isfinite().all() & self.gradient.traces().isfinite().all()

    def to_state(self) -> dict[str, Any]:
        """Return what a checkpoint stores: nested dicts of tensors and numbers."""
        return {
            "scale": self.scale,
            "activation": self.activation.to_state(),
            "gradient": self.gradient.to_state(),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any], geometry: LayerGeometry) -> "LayerFactors | None":
        """Undo :meth:`to_state`, for a layer of this geometry; ``None`` where the state is empty."""
        if not state:
            return None
        activation, gradient = (factor_from_state(state[side], geometry) for side in ("activation", "gradient"))
        return cls(activation, gradient, state["scale"])


def finite_layers(layer_factors: Iterable[LayerFactors]) -> list[bool]:
    """Return for each layer whether its factors are finite, with one host synchronisation for all."""
    flags = [factors.is_finite() for factors in layer_factors]
    return torch.stack(on_one_device(flags)).tolist() if flags else []  # [layers]


@dataclass
class RunningAverage:
    """Exponential average of measured factors: started from zero, divided by the sum of its weights, no identity added.

    Reference: averaging: Martens & Grosse (2015), Sec. 5; the correction for the start: Kingma & Ba (2015), Sec. 3.

    Args:
        decay: Decay per measurement, in [0, 1); 0 keeps only the newest measurement, with its rows.
        value: The average before correction; ``None`` before the first measurement.
        weight: Sum of the weights in it: 1 − decayᵏ after k measurements.
    """

    decay: float
    value: LayerFactors | None = None
    weight: float = 0.0

    def update(self, new: LayerFactors) -> None:
        """Average a measurement in."""
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
        """Return the average divided by the sum of its weights."""
        assert self.value is not None, "no measurement yet"
        if self.decay == 0:
            return self.value
        activation, gradient = self.value.activation, self.value.gradient
        return LayerFactors(
            activation=activation.with_values(activation.values / self.weight),
            gradient=gradient.with_values(gradient.values / self.weight),
            scale=self.value.scale,
        )

    def to_state(self) -> dict[str, Any]:
        """Return what a checkpoint stores; empty before the first measurement."""
        return {} if self.value is None else {"weight": self.weight, **self.value.to_state()}

    @classmethod
    def from_state(cls, state: Mapping[str, Any], decay: float, geometry: LayerGeometry) -> "RunningAverage":
        """Undo :meth:`to_state`."""
        return cls(decay, LayerFactors.from_state(state, geometry), state.get("weight", 0.0))

    def _blend(self, old: Factor | None, new: Factor) -> Factor:
        moment = new.as_moment(moment_form(new.width))
        if old is None:
            return moment.with_values(moment.values * (1 - self.decay))
        assert type(old) is type(moment), "moments of two forms do not add up"
        average = old.values.to(moment.values)
        # In place, so that there is no second copy of the average.
        return moment.with_values(torch.lerp(moment.values, average, self.decay, out=average))
