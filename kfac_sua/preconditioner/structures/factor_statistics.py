"""What Kronecker structures keep of a layer's calls: the moments of inputs and of output gradients, each by itself."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from kfac_sua.preconditioner.factors import LayerFactors
from kfac_sua.preconditioner.forms import moments
from kfac_sua.preconditioner.forms.accumulator import ActivationAccumulator, MomentAccumulator, Scalings
from kfac_sua.preconditioner.forms.cost import MAX_KEPT_ROWS
from kfac_sua.preconditioner.geometry import BlockLayout, LayerGeometry
from kfac_sua.preconditioner.kronecker import LayerInverse
from kfac_sua.preconditioner.statistics import Call, CallRows, LayerStatistics


class FactorStatistics(LayerStatistics):
    """Collects inputs and output gradients of one layer and turns them into normalised factors.

    Args:
        name: The layer's name, for messages.
        geometry: Its geometry.
        layout: Its block layout.
        reduce: Whether ``weight_sharing`` is ``reduce``.
        max_activation_rows: Number of rows up to which the activation factor is kept as rows.
        max_gradient_rows: The same for the gradient factor.
        sampled_rows: Largest number of rows of the activation factor measured per call; ``None`` for all.
    """

    def __init__(
        self,
        name: str,
        geometry: LayerGeometry,
        layout: BlockLayout,
        *,
        reduce: bool,
        max_activation_rows: int,
        max_gradient_rows: int,
        sampled_rows: int | None = None,
    ) -> None:
        self.layout = layout
        self.reduce = reduce
        self.max_rows = (max_activation_rows, max_gradient_rows)
        self._max_sampled_rows = sampled_rows
        super().__init__(name, geometry)

    def new_accumulator(self) -> ActivationAccumulator:
        """Return an empty moment of inputs."""
        return ActivationAccumulator(self.max_rows[0], self.geometry, self.layout, self._max_sampled_rows)

    def _new_rows(self) -> CallRows:
        return _CallMoments(self)

    def _forget_absorbed(self) -> None:
        self._activation = self.new_accumulator()
        self._gradient = MomentAccumulator(self.max_rows[1])
        self._sums: dict[int, _PassSums] = {}

    def _absorb(self, calls: Sequence[Call]) -> None:
        rows = []
        for call in calls:
            assert isinstance(call.rows, _CallMoments)
            rows.append(call.rows)
            if self.reduce:
                self._sums.setdefault(call.model_pass.index, _PassSums()).add(call.rows, call.num_locations)
        self._activation.absorb([one.activation for one in rows if one.activation is not None])
        self._gradient.absorb([one.gradient for one in rows if one.gradient is not None])
        for one in rows:
            one.activation = one.gradient = None

    def _measured(
        self,
        num_examples: int,
        num_rows: int,
        *,
        num_averaged: int,
        loss_scale: float,
        scalings: Scalings,
        inverse: LayerInverse | None,
    ) -> LayerFactors:
        """Return the normalised factors of the counted calls.

        Reference: the normalisation of ``expand`` and ``reduce`` in ``forms.moments``.
        """
        del inverse
        per_gradient = num_averaged**2 / loss_scale**2
        self._activation.fold_inputs()
        if self.reduce:
            self._fold_passes()
            num_rows = num_examples  # every example is one row
        kept = max(self._activation.num_rows, self._gradient.num_rows)
        if kept > MAX_KEPT_ROWS:
            raise RuntimeError(
                f"Layer {self.name!r}: inverse_method=low_rank would factorise a {kept}x{kept} matrix; use "
                f"inverse_method=auto, which takes the smaller side."
            )
        return LayerFactors(
            activation=self._activation.factor(1 / (num_rows * self.layout.identity_taps), scalings),
            gradient=self._gradient.factor(per_gradient / num_rows, scalings),
            scale=num_rows / num_examples,
            num_rows=num_rows,
        )

    def _fold_passes(self) -> None:
        """Turn the sums of every pass into rows: inputs averaged and output gradients summed over locations."""
        for one in self._sums.values():
            assert one.inputs is not None
            self._activation.add(one.inputs / one.num_locations)
            for sums in one.output_grads.values():
                self._gradient.add(sums)


class _CallMoments(CallRows):
    """The moments of one call under ``expand``; under ``reduce`` its sums over locations, per example.

    Args:
        statistics: The layer's.
    """

    def __init__(self, statistics: FactorStatistics) -> None:
        self._statistics = statistics
        self.activation: ActivationAccumulator | None = None
        self.gradient: MomentAccumulator | None = None
        self.input_sums: Tensor | None = None
        self.output_grad_sums: dict[int, Tensor] = {}

    def read_inputs(self, inputs: Tensor) -> None:
        statistics = self._statistics
        if statistics.reduce:
            self.input_sums = moments.reduced_activation_rows(inputs, statistics.geometry, statistics.layout)
            return
        self.activation = statistics.new_accumulator()
        self.activation.add_inputs(inputs)

    def read_output_grads(self, output_grads: Tensor, sample: int) -> None:
        statistics = self._statistics
        rows = moments.gradient_rows(output_grads, statistics.layout, reduce=statistics.reduce)
        if statistics.reduce:
            self.output_grad_sums[sample] = rows
            return
        if self.gradient is None:
            self.gradient = MomentAccumulator(statistics.max_rows[1])
        self.gradient.add(rows)

    def forget_output_grads(self) -> None:
        self.gradient = None
        self.output_grad_sums.clear()


@dataclass
class _PassSums:
    """The sums over the locations of all calls of one forward pass, under ``reduce``."""

    num_locations: int = 0
    inputs: Tensor | None = None
    output_grads: dict[int, Tensor] = field(default_factory=dict)

    def add(self, rows: _CallMoments, num_locations: int) -> None:
        assert rows.input_sums is not None
        self.num_locations += num_locations
        self.inputs = rows.input_sums if self.inputs is None else self.inputs + rows.input_sums
        for sample, sums in rows.output_grad_sums.items():
            before = self.output_grads.get(sample)
            self.output_grads[sample] = sums if before is None else before + sums
