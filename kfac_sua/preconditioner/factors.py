"""What is measured of a layer, such as its two factors, and the bias-corrected running average of it."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from kfac_sua.preconditioner.forms import Factor, factor_from_state, moment_form
from kfac_sua.preconditioner.geometry import LayerGeometry
from kfac_sua.preconditioner.precision import on_one_device


class LayerMeasurement(ABC):
    """What mini-batches say of a layer's Fisher block, without damping.

    Attributes:
        scale: S, output locations per example; 1 under ``reduce``.
        num_rows: Rows that it was measured from, by which processes weight their averages; 0 for what has been averaged
            over time or read from a checkpoint, which is not weighted any more.
    """

    scale: float
    num_rows: int

    @property
    @abstractmethod
    def reference_tensor(self) -> Tensor:
        """A tensor that has the device and the dtype of the measurement."""

    @abstractmethod
    def is_finite(self) -> Tensor:
        """Whether no entry is NaN or infinite, as a 0-d bool tensor on the device."""

    @abstractmethod
    def blended(self, old: Self | None, decay: float) -> Self:
        """Return ``decay · old + (1 − decay) · self``; the old one may be written over."""

    @abstractmethod
    def divided(self, weight: float) -> Self:
        """Return it divided by the sum of the weights of an average."""

    @abstractmethod
    def to_state(self) -> dict[str, Any]:
        """Return what a checkpoint stores: nested dicts of tensors and numbers."""


@dataclass
class LayerFactors(LayerMeasurement):
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

    @property
    def reference_tensor(self) -> Tensor:
        """A tensor that has the device and the dtype of the factors."""
        return self.gradient.values

    def is_finite(self) -> Tensor:
        """Whether no entry is NaN or infinite, as a 0-d bool tensor on the device."""
        return self.activation.traces().isfinite().all() & self.gradient.traces().isfinite().all()

    def blended(self, old: "LayerFactors | None", decay: float) -> "LayerFactors":
        """Return ``decay · old + (1 − decay) · self``, as moments, in the tensors of the old one."""
        return LayerFactors(
            activation=_blend(old.activation if old else None, self.activation, decay),
            gradient=_blend(old.gradient if old else None, self.gradient, decay),
            scale=self.scale,
        )

    def divided(self, weight: float) -> "LayerFactors":
        """Return both factors divided by a number."""
        activation, gradient = self.activation, self.gradient
        return LayerFactors(
            activation=activation.with_values(activation.values / weight),
            gradient=gradient.with_values(gradient.values / weight),
            scale=self.scale,
        )

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


def finite_layers(measured: Iterable[LayerMeasurement]) -> list[bool]:
    """Return for each layer whether its measurement is finite, with one host synchronisation for all."""
    flags = [one.is_finite() for one in measured]
    return torch.stack(on_one_device(flags)).tolist() if flags else []  # [layers]


def _blend(old: Factor | None, new: Factor, decay: float) -> Factor:
    moment = new.as_moment(moment_form(new.width))
    if old is None:
        return moment.with_values(moment.values * (1 - decay))
    assert type(old) is type(moment), "moments of two forms do not add up"
    average = old.values.to(moment.values)
    # In place, so that there is no second copy of the average.
    return moment.with_values(torch.lerp(moment.values, average, decay, out=average))


@dataclass
class RunningAverage:
    """Exponential average of measurements: started from zero, divided by the sum of its weights, no identity added.

    Reference: averaging: Martens & Grosse (2015), Sec. 5; the correction for the start: Kingma & Ba (2015), Sec. 3.

    Args:
        decay: Decay per measurement, in [0, 1); 0 keeps only the newest measurement, with its rows.
        value: The average before correction; ``None`` before the first measurement.
        weight: Sum of the weights in it: 1 − decayᵏ after k measurements.
    """

    decay: float
    value: LayerMeasurement | None = None
    weight: float = 0.0

    def update(self, new: LayerMeasurement) -> None:
        """Average a measurement in."""
        self.weight = self.decay * self.weight + 1 - self.decay
        self.value = new if self.decay == 0 else new.blended(self.value, self.decay)

    def corrected(self) -> LayerMeasurement:
        """Return the average divided by the sum of its weights."""
        assert self.value is not None, "no measurement yet"
        return self.value if self.decay == 0 else self.value.divided(self.weight)

    def to_state(self) -> dict[str, Any]:
        """Return what a checkpoint stores; empty before the first measurement."""
        return {} if self.value is None else {"weight": self.weight, **self.value.to_state()}

    @classmethod
    def from_state(
        cls, state: Mapping[str, Any], decay: float, read: Callable[[Mapping[str, Any]], LayerMeasurement | None]
    ) -> "RunningAverage":
        """Undo :meth:`to_state`.

        Args:
            state: What :meth:`to_state` returned.
            decay: Decay per measurement.
            read: Undoes ``to_state`` of a measurement; returns ``None`` where the state is empty.
        """
        return cls(decay, read(state), state.get("weight", 0.0))
