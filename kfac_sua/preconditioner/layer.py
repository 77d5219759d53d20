"""One preconditioned layer: its module, block layout, statistics, running average and inverse."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kfac_sua.preconditioner.apply import precondition_
from kfac_sua.preconditioner.checkpoint.in_place import to_be_written_over, written_over
from kfac_sua.preconditioner.checkpoint.layer_checks import Finding, StateHolder, check_findings, layer_findings
from kfac_sua.preconditioner.factors import LayerMeasurement, RunningAverage
from kfac_sua.preconditioner.geometry import BlockLayout, LayerGeometry
from kfac_sua.preconditioner.kronecker import (
    BOTH_SIDES,
    LayerInverse,
    Sides,
)
from kfac_sua.preconditioner.model.backward_application import BackwardApplication, can_apply_in_backward
from kfac_sua.preconditioner.model.discovery import foreign_forward
from kfac_sua.preconditioner.model.used_gradient import GradientWatch, is_preconditioned
from kfac_sua.preconditioner.phases import PhaseSource
from kfac_sua.preconditioner.precision import at_least_float32, fits
from kfac_sua.preconditioner.registry import structure_class
from kfac_sua.preconditioner.settings import Application, KroneckerSettings
from kfac_sua.preconditioner.statistics import LayerStatistics
from kfac_sua.preconditioner.structures.structure import FisherStructure


@dataclass
class PreconditionedLayer:
    """Everything kept for one layer.

    Args:
        name: Dotted name in the model.
        module: ``nn.Linear`` or ``nn.Conv2d``.
        structure: How its Fisher block is approximated.
        statistics: What its hooks feed.
        average: Running average of its factors.
        settings: Settings of the preconditioner.
        backward_application: Its replaced forward, if its inverse may be applied in the backward pass.
        inverse: Inverse of its damped block; ``None`` before the first refresh.
        is_fresh: Whether factors have been measured since the last refresh.
        num_examples: Examples of the last measurement, over all processes; ``None`` before the first.
        num_processes: Processes that share a mini-batch.
        keeps_factors: Whether to keep the factors of the last refresh.
        factors: The factors of the last refresh, if they are kept.
    """

    name: str
    module: nn.Module
    structure: FisherStructure[Any]
    statistics: LayerStatistics
    average: RunningAverage
    settings: KroneckerSettings
    backward_application: BackwardApplication | None = None
    inverse: LayerInverse | None = None
    is_fresh: bool = False
    num_examples: int | None = None
    num_processes: int = 1
    keeps_factors: bool = False
    factors: LayerMeasurement | None = None
    _watched: tuple[nn.Parameter, GradientWatch] | None = None

    @classmethod
    def make(
        cls,
        name: str,
        module: nn.Module,
        geometry: LayerGeometry,
        settings: KroneckerSettings,
        phases: PhaseSource,
        num_processes: int = 1,
    ) -> "PreconditionedLayer":
        """Lay out a discovered layer as the settings say."""
        assert isinstance(module.weight, Tensor)
        structure = structure_class(settings.structure)(geometry, settings, module.weight.device)
        statistics = structure.new_statistics(name, num_processes)
        average = RunningAverage(settings.ema_decay)
        layer = cls(name, module, structure, statistics, average, settings, num_processes=num_processes)
        is_plain = foreign_forward(module) is None  # a foreign forward, which may do more, is not replaced
        costs = structure.side_costs
        wants_backward = settings.application is Application.auto and costs is not None
        if wants_backward and is_plain and can_apply_in_backward(module, geometry):
            assert isinstance(module, nn.Conv2d)
            layer.backward_application = BackwardApplication(name, module, geometry, structure.layout, costs, phases)
        return layer

    @property
    def layout(self) -> BlockLayout:
        """How its weight gradient is viewed when it is multiplied."""
        return self.structure.layout

    @property
    def weight(self) -> nn.Parameter:
        """Its weight."""
        weight = self.module.weight
        assert isinstance(weight, nn.Parameter)
        return weight

    @property
    def bias(self) -> nn.Parameter | None:
        """Its bias, if it has one."""
        bias = self.module.bias
        return bias if isinstance(bias, nn.Parameter) else None

    def begin_step(self, *, plain_gradient: bool) -> None:
        """Let the coming backward pass apply the inverse, unless the step needs the plain gradient."""
        if self.backward_application is not None:
            self.backward_application.inverse = (
                None if plain_gradient or self.inverse is None else self.inverse.by_sides
            )
            # A process alone chooses by the mini-batch at hand.
            is_shared = self.num_processes > 1
            self.backward_application.num_examples = (
                math.ceil((self.num_examples or 0) / self.num_processes) if is_shared else None
            )

    def pause(self, is_paused: bool) -> bool:
        """Set whether the gradients of coming forward passes stay plain; return whether they did before."""
        if self.backward_application is None:
            return False
        was_paused, self.backward_application.is_paused = self.backward_application.is_paused, is_paused
        return was_paused

    def add_measurement(self, factors: LayerMeasurement) -> None:
        """Add the factors of a mini-batch to the running average."""
        self.average.update(factors)
        self.num_examples = round(factors.num_rows / factors.scale)
        self.is_fresh = True

    def follow_weight(self) -> None:
        """Move inverse and running average to the weight's device and precision, if these have changed."""
        weight, kept = self.module.weight, self._kept_tensor()
        if isinstance(weight, Tensor):
            self.structure.follow(weight.device, self.statistics)
            if self.backward_application is not None and self.structure.side_costs is not None:
                self.backward_application.costs = self.structure.side_costs
        if kept is not None and isinstance(weight, Tensor) and not fits(kept, weight):
            self.prepare_state(self.state_dict())()

    @property
    def structure_at_hand(self) -> FisherStructure[Any]:
        """Its structure under the precision switches that the caller has set now."""
        return self.structure.at_hand(at_least_float32(self.weight.detach()))

    @property
    def read_tensors(self) -> list[Tensor]:
        """The tensors that a plain step reads of the layer, apart from its parameters."""
        return [] if self.inverse is None else self.inverse.tensors()

    def finish_refresh(self, factors: LayerMeasurement) -> None:
        """Drop what the next refresh does not need of the refresh that has just been made.

        Factors that are kept are written over those of the refresh before: new tensors would lie in memory that the
        next replay of a captured step overwrites.

        Args:
            factors: The factors that were inverted.
        """
        self.is_fresh = False
        kept = factors.to_state() if self.keeps_factors else {}
        state = written_over(_state_of(self.factors), kept, factors.reference_tensor)
        self.factors = self.structure.measurement_from_state(state)
        if self.average.decay == 0:
            self.average = RunningAverage(0.0)

    def forget_measurement(self) -> None:
        """Drop the factors that wait for a refresh, which are not finite."""
        self.is_fresh = False
        self.average = RunningAverage(self.average.decay)

    def discard_gradient(self) -> None:
        """Forget which sides the gradient carries, as it is thrown away."""
        if self.backward_application is not None:
            self.backward_application.forget_backward()

    def take_missing_sides(self) -> Sides:
        """Return the sides that the gradient does not carry yet."""
        return self.backward_application.take_applied_sides().complement() if self.backward_application else BOTH_SIDES

    def has_gradient(self) -> bool:
        """Return whether its weight has a gradient that is not zero; waits for the device."""
        grad = self.weight.grad
        return grad is not None and bool(grad.any())

    @property
    def is_preconditioned(self) -> bool:
        """Whether its gradient has been preconditioned, and nothing was added to it since."""
        return is_preconditioned(self.weight)

    def mark_preconditioned(self) -> None:
        """Note that its gradient is preconditioned, until autograd adds to it."""
        weight = self.weight
        if self.inverse is None or weight.grad is None:
            return
        if self._watched is None or self._watched[0] is not weight:
            self._unwatch()
            self._watched = weight, GradientWatch.join(weight)
        self._watched[1].mark(weight)

    @property
    def adds_to_preconditioned(self) -> bool:
        """Whether the step's gradients were added to those of the step before, which had been preconditioned."""
        return self._watched is not None and self._watched[1].was_added_to

    @property
    def preconditioned_grads(self) -> list[Tensor]:
        """The gradients that :meth:`precondition_` changes."""
        grads = self.weight.grad, _trainable_grad(self.bias)
        is_changed = self.inverse is not None and self.weight.grad is not None
        return [grad for grad in grads if grad is not None] if is_changed else []

    def precondition_(self, sides: Sides) -> None:
        """Multiply the gradients in place by the given sides of the inverse."""
        if self.inverse is not None and self.weight.grad is not None:
            precondition_(self.weight.grad, _trainable_grad(self.bias), self.layout, self.inverse, sides)

    def state_dict(self) -> dict[str, Any]:
        """Return the layer's state, as tensors and numbers."""
        return {
            "average": self.average.to_state(),
            "is_fresh": self.is_fresh,
            "num_examples": self.num_examples,
            "inverse": _state_of(self.inverse),
            "factors": _state_of(self.factors),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Undo :meth:`state_dict`, on the weight's device and in the precision that goes with it.

        Tensors are written in place where shapes agree; those of the state are copied.

        Raises:
            ValueError: If it is not the state of such a layer; the layer is then as it was.
        """
        check_findings(self.state_findings(state))
        self.prepare_state(state)()

    def state_findings(self, state: object) -> Iterator[Finding]:
        """Check a state that the layer is to continue from; see ``checkpoint.layer_checks.layer_findings``."""
        like = at_least_float32(self.weight.detach())
        holder = StateHolder(self.name, self.statistics.geometry, self.layout, self.settings, like)
        yield from layer_findings(state, holder, self.structure)

    def prepare_state(self, state: Mapping[str, Any]) -> Callable[[], None]:
        """Prepare a state, and return the function that makes the layer take it; until then the layer is unchanged.

        Args:
            state: A state with which :meth:`state_findings` has found nothing wrong.
        """
        with torch.no_grad():
            state, write = to_be_written_over(self.state_dict(), state, at_least_float32(self.weight.detach()))
        structure = self.structure
        average = RunningAverage.from_state(state["average"], self.average.decay, structure.measurement_from_state)
        inverse = structure.inverse_from_state(state["inverse"])
        factors = structure.measurement_from_state(state["factors"])

        def take_over() -> None:
            with torch.no_grad():
                write()
            self.average, self.inverse, self.factors = average, inverse, factors
            self.is_fresh, self.num_examples = state["is_fresh"], state["num_examples"]

        return take_over

    def _kept_tensor(self) -> Tensor | None:
        """Return one of the tensors that are kept from step to step, if there is any."""
        if self.inverse is not None:
            return self.inverse.reference_tensor
        return None if self.average.value is None else self.average.value.reference_tensor

    def remove(self) -> None:
        """Give the module its own forward back, and take the hook off its weight."""
        self._unwatch()
        if self.backward_application is not None:
            self.backward_application.remove()

    def _unwatch(self) -> None:
        if self._watched is not None:
            self._watched[1].leave()
            self._watched = None


def take_inverses(taken: Sequence[tuple[PreconditionedLayer, LayerInverse]]) -> None:
    """Replace the inverses of layers, in place wherever the new one's tensors have the shapes of those at hand.

    Captured steps read inverses by address. The new ones are copied, in one call, as they may share pixels with the
    factors that they were made of and memory with inverses of other layers.

    Args:
        taken: Each layer with its new inverse.
    """
    kept = {layer.name: _state_of(layer.inverse) for layer, _ in taken}
    state = written_over(kept, {layer.name: inverse.to_state() for layer, inverse in taken})
    for layer, _ in taken:
        layer.inverse = layer.structure.inverse_from_state(state[layer.name])


def _state_of(kept: LayerInverse | LayerMeasurement | None) -> dict[str, Any]:
    """Return what a checkpoint keeps of an inverse or of factors; empty for ``None``."""
    return {} if kept is None else kept.to_state()


def _trainable_grad(bias: nn.Parameter | None) -> Tensor | None:
    return bias.grad if bias is not None and bias.requires_grad else None
