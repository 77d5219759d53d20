"""What structures computed from rows keep of a layer's calls: copies of inputs and output gradients."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from kfac_sua.preconditioner.factors import LayerMeasurement
from kfac_sua.preconditioner.forms.accumulator import Scalings
from kfac_sua.preconditioner.geometry import LayerGeometry
from kfac_sua.preconditioner.kronecker import LayerInverse
from kfac_sua.preconditioner.statistics import Call, CallRows, LayerStatistics
from kfac_sua.preconditioner.structures.rows import ReadCall


class Measure(Protocol):
    """Computes a measurement from the calls of a mini-batch."""

    def __call__(
        self,
        passes: Sequence[Sequence[ReadCall]],
        num_examples: int,
        num_rows: int,
        grad_scale: float,
        inverse: LayerInverse | None,
    ) -> LayerMeasurement:
        """Return the measurement.

        Args:
            passes: Calls by the model's forward pass.
            num_examples: Examples of all passes.
            num_rows: Output locations of all examples.
            grad_scale: Multiplies output gradients to those of the per-example loss.
            inverse: The layer's inverse at hand; ``None`` before the first.
        """


class RowStatistics(LayerStatistics):
    """Keeps copies of all inputs and output gradients until the step.

    Args:
        name: The layer's name, for messages.
        geometry: Its geometry.
        measure: Computes the measurement from them.
        needs_output_grads: Whether it needs output gradients.
    """

    def __init__(self, name: str, geometry: LayerGeometry, measure: Measure, *, needs_output_grads: bool) -> None:
        self._measure = measure
        self._needs_output_grads = needs_output_grads
        super().__init__(name, geometry)

    def _new_rows(self) -> CallRows:
        return _ReadRows(self._needs_output_grads)

    def _forget_absorbed(self) -> None:
        self._read: dict[int, list[ReadCall]] = {}

    def _absorb(self, calls: Sequence[Call]) -> None:
        for call in calls:
            assert isinstance(call.rows, _ReadRows)
            self._read.setdefault(call.model_pass.index, []).append(call.rows.taken())

    def _measured(
        self,
        num_examples: int,
        num_rows: int,
        *,
        num_averaged: int,
        loss_scale: float,
        scalings: Scalings,
        inverse: LayerInverse | None,
    ) -> LayerMeasurement:
        del scalings
        return self._measure([*self._read.values()], num_examples, num_rows, num_averaged / loss_scale, inverse)


class _ReadRows(CallRows):
    """Copies of one call's inputs, and of its output gradients if they are needed."""

    def __init__(self, needs_output_grads: bool) -> None:
        self._needs_output_grads = needs_output_grads
        self._inputs: Tensor | None = None
        self._output_grads: dict[int, Tensor] = {}

    def taken(self) -> ReadCall:
        """Return what has been read, which is not kept here any more."""
        assert self._inputs is not None
        taken = ReadCall(self._inputs, self._output_grads)
        self._inputs, self._output_grads = None, {}
        return taken

    def read_inputs(self, inputs: Tensor) -> None:
        self._inputs = inputs.clone()

    def read_output_grads(self, output_grads: Tensor, sample: int) -> None:
        if self._needs_output_grads:
            self._output_grads[sample] = output_grads.clone()

    def forget_output_grads(self) -> None:
        self._output_grads = {}
