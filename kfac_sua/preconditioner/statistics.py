"""Statistics of one layer over the mini-batch, or the accumulated micro-batches, of one optimisation step.

Each call of the layer is measured separately, and *counted* once it is known that its weight gradient is part of
``.grad`` (see ``model.recorder``). Calls that are not counted have no effect.
"""

import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kfac_sua.preconditioner.factors import LayerFactors
from kfac_sua.preconditioner.forms import moments
from kfac_sua.preconditioner.forms.accumulator import ActivationAccumulator, MomentAccumulator, Scalings
from kfac_sua.preconditioner.forms.cost import MAX_KEPT_ROWS
from kfac_sua.preconditioner.forms.unfold import to_locations
from kfac_sua.preconditioner.geometry import BlockLayout, LayerGeometry
from kfac_sua.preconditioner.precision import at_least_float32


@dataclass(frozen=True)
class ModelPass:
    """One forward pass of the model.

    Args:
        index: Its number since the last step.
        num_examples: First dimension of the model's input; ``None`` if that is not known.
        start: Number of the first node that it adds to autograd's graph.
    """

    index: int
    num_examples: int | None = None
    start: int = 0


@dataclass(eq=False)
class Call:
    """One call of a layer.

    Args:
        model_pass: The model's forward pass that it belongs to.
        num_examples: First dimension of its inputs.
        num_locations: Output locations per example.
        inputs: Its inputs until they are measured, ``[n, h, w, channels]``; ``None`` afterwards.
        activation: Moment of its inputs under ``expand``; ``None`` until they are measured.
        gradient: Moment of its output gradients under ``expand``; ``None`` until one has arrived.
        input_sums: Under ``reduce``, sums of the inputs over locations, per example.
        output_grad_sums: Under ``reduce``, sums of the output gradients over locations, per example, by ``sample``.
        samples: Indices of the backward passes that have sent an output gradient: one, or one per class for the
            ``exact`` Fisher.
        counted_in: The step that it was counted in; ``None`` if it has not been counted.
        is_forgotten: Whether it must not be counted any more.
        task: The last backward pass towards ``.grad`` that has reached the call.
        compared: Some of its inputs, for ``gradient_check``.
    """

    model_pass: ModelPass
    num_examples: int
    num_locations: int
    inputs: Tensor | None = None
    activation: ActivationAccumulator | None = None
    gradient: MomentAccumulator | None = None
    input_sums: Tensor | None = None
    output_grad_sums: dict[int, Tensor] = field(default_factory=dict)
    samples: set[int] = field(default_factory=set)
    counted_in: object = None
    is_forgotten: bool = False
    task: int | None = None
    compared: Tensor | None = None

    def forget_output_grads(self) -> None:
        """Forget the output gradients of a backward pass that did not add a weight gradient to ``.grad``."""
        self.gradient = None
        self.output_grad_sums.clear()
        self.samples.clear()


@dataclass
class _Pass:
    """The counted calls of one forward pass of the model: its examples, and the locations of all calls together."""

    model_pass: ModelPass
    num_examples: int
    num_locations: int = 0
    input_sums: Tensor | None = None
    output_grad_sums: dict[int, Tensor] = field(default_factory=dict)


class LayerStatistics:
    """Collects inputs and output gradients of one layer and turns them into normalised factors.

    A layer that is called several times within one forward pass shares its weight over the calls, as a convolution
    shares it over locations: the locations of all calls count together. Several forward passes before one step
    (gradient accumulation) are more examples.

    Args:
        name: The layer's name, for messages.
        geometry: Its geometry.
        layout: Its block layout.
        reduce: Whether ``weight_sharing`` is ``reduce``.
        max_activation_rows: Number of rows up to which the activation factor is kept as rows.
        max_gradient_rows: The same for the gradient factor.
        sampled_rows: Largest number of rows of the activation factor measured per call; ``None`` for all.

    A call that is not counted yet is kept only by autograd's graph: when no backward pass can reach it any more, its
    memory is freed.

    Attributes:
        step: An object that identifies the step that calls are counted in.
        was_empty: Whether the layer was called without examples.
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
        self.name = name
        self.geometry = geometry
        self.layout = layout
        self.reduce = reduce
        self.max_rows = (max_activation_rows, max_gradient_rows)
        self._max_sampled_rows = sampled_rows
        self._calls: weakref.WeakValueDictionary[int, Call] = weakref.WeakValueDictionary()  # by their number
        self._num_calls = 0
        self.clear()

    def clear(self) -> None:
        """Forget the calls counted for a step, but not those that a backward pass may still reach."""
        self.step = object()
        self.was_empty = False
        self.forget_counted()

    def forget_open(self) -> None:
        """Forget the calls that have not been counted."""
        for call in self.open_calls:
            call.is_forgotten = True

    def forget_counted(self) -> None:
        """Forget the calls that were counted, for example as their gradient is discarded."""
        max_activation_rows, max_gradient_rows = self.max_rows
        self._activation = self._activation_accumulator(max_activation_rows)
        self._gradient = MomentAccumulator(max_gradient_rows)
        self._passes: dict[int, _Pass] = {}
        self._unequal_examples: tuple[int, int] | None = None

    @property
    def open_calls(self) -> list[Call]:
        """Calls that may still be counted, in their order."""
        return [call for call in self._calls.values() if call.counted_in is None and not call.is_forgotten]

    @property
    def num_counted(self) -> int:
        """Forward passes of the model in which a call was counted."""
        return len(self._passes)

    @property
    def num_examples(self) -> int:
        """Examples in all passes counted."""
        return sum(one.num_examples for one in self._passes.values())

    @property
    def num_model_examples(self) -> int | None:
        """Examples by the first dimension of the model's input; ``None`` where that is not known."""
        counts = [one.model_pass.num_examples for one in self._passes.values()]
        known = [count for count in counts if count is not None]
        return sum(known) if len(known) == len(counts) else None

    @torch.no_grad()
    def add_call(self, inputs: Tensor, output_shape: torch.Size, model_pass: ModelPass, *, waits: bool = False) -> Call:
        """Record one call.

        Args:
            inputs: The layer's inputs.
            output_shape: Shape of its outputs.
            model_pass: The model's forward pass.
            waits: Keep the inputs, and measure them when an output gradient arrives.

        Returns:
            The call, for :meth:`add_output_grads` and :meth:`count`. The caller must keep a reference to it.
        """
        inputs = to_locations(inputs.detach(), self.geometry)
        call = Call(model_pass, inputs.shape[0], self._num_locations(output_shape), inputs)
        if not waits:
            self._measure_inputs(call)
        self._calls[self._num_calls] = call
        self._num_calls += 1
        return call

    @torch.no_grad()
    def add_output_grads(self, output_grads: Tensor, call: Call, sample: int = 0) -> None:
        """Record the output gradients of one call.

        Args:
            output_grads: Gradient with respect to the call's output.
            call: What :meth:`add_call` returned for it.
            sample: Index of the backward pass (several for the ``exact`` Fisher): ``reduce`` sums over the calls of
                each backward pass separately.

        Raises:
            RuntimeError: If the call has received this output gradient before.
        """
        if call.counted_in is not None or sample in call.samples:
            raise RuntimeError(
                f"Layer {self.name!r}: a second backward pass reached one forward pass while statistics were recorded; "
                f"add losses up for one backward pass, and run passes that are not the training step's inside "
                f"preconditioner.paused()."
            )
        self._measure_inputs(call)
        call.samples.add(sample)
        grads = to_locations(at_least_float32(output_grads.detach()), self.geometry)
        rows = moments.gradient_rows(grads, self.layout, reduce=self.reduce)
        if self.reduce:
            call.output_grad_sums[sample] = rows
            return
        if call.gradient is None:
            call.gradient = MomentAccumulator(self.max_rows[1])
        call.gradient.add(rows)

    @torch.no_grad()
    def count(self, calls: Iterable[Call]) -> None:
        """Count calls whose output gradients have arrived: their gradient is part of ``.grad``.

        Rows are added in the order of the calls, as those of several processes with a call each.
        """
        chosen = set(map(id, calls))
        expanded = []
        for call in [call for call in self.open_calls if id(call) in chosen]:
            call.counted_in = self.step
            one = self._passes.setdefault(call.model_pass.index, _Pass(call.model_pass, call.num_examples))
            if one.num_examples != call.num_examples:
                self._unequal_examples = (
                    min(one.num_examples, call.num_examples),
                    max(one.num_examples, call.num_examples),
                )
                continue
            one.num_locations += call.num_locations
            if not self.reduce:
                expanded.append(call)
                continue
            assert call.input_sums is not None
            one.input_sums = call.input_sums if one.input_sums is None else one.input_sums + call.input_sums
            for sample, sums in call.output_grad_sums.items():
                before = one.output_grad_sums.get(sample)
                one.output_grad_sums[sample] = sums if before is None else before + sums
        self._activation.absorb([call.activation for call in expanded if call.activation is not None])
        self._gradient.absorb([call.gradient for call in expanded if call.gradient is not None])
        for call in expanded:
            call.activation = call.gradient = None

    def factors(
        self, *, grads_of_mean_loss: bool, loss_scale: float = 1.0, scalings: Scalings | None = None
    ) -> LayerFactors | None:
        """Return the normalised factors of the counted calls, or ``None`` if there are none.

        Reference: the normalisation of ``expand`` and ``reduce`` in ``forms.moments``.

        Args:
            grads_of_mean_loss: Whether the output gradients are those of the *mean* over examples; they are then
                multiplied by the number of examples (of all micro-batches together).
            loss_scale: What the loss was multiplied by; the output gradients are divided by it.
            scalings: Collects the multiplications that the factors still need, so that the caller carries them out for
                several layers at once; ``None`` to multiply here.

        Raises:
            RuntimeError: If calls of one forward pass had different numbers of examples.
        """
        if self._unequal_examples is not None:
            fewer, more = self._unequal_examples
            raise RuntimeError(
                f"Layer {self.name!r} was called with {fewer} and with {more} examples within "
                f"one forward pass; statistics over such calls are not defined, list it in skip."
            )
        if not self._passes:
            return None
        num_examples = self.num_examples
        num_rows = sum(one.num_examples * one.num_locations for one in self._passes.values())
        per_gradient = (num_examples if grads_of_mean_loss else 1) ** 2 / loss_scale**2
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
        own = Scalings() if scalings is None else scalings
        factors = LayerFactors(
            activation=self._activation.factor(1 / (num_rows * self.layout.identity_taps), own),
            gradient=self._gradient.factor(per_gradient / num_rows, own),
            scale=num_rows / num_examples,
            num_rows=num_rows,
        )
        if scalings is None:
            own.carry_out()
        return factors

    def _measure_inputs(self, call: Call) -> None:
        """Measure the inputs of a call, unless they have been measured."""
        if call.inputs is None:
            return
        inputs, call.inputs = at_least_float32(call.inputs), None
        if self.reduce:
            call.input_sums = moments.reduced_activation_rows(inputs, self.geometry, self.layout)
            return
        call.activation = self._activation_accumulator(self.max_rows[0])
        call.activation.add_inputs(inputs)

    def _activation_accumulator(self, max_rows: int) -> ActivationAccumulator:
        return ActivationAccumulator(max_rows, self.geometry, self.layout, self._max_sampled_rows)

    def _fold_passes(self) -> None:
        """Turn the sums of every pass into rows: inputs averaged and output gradients summed over locations."""
        for one in self._passes.values():
            assert one.input_sums is not None
            self._activation.add(one.input_sums / one.num_locations)
            for sums in one.output_grad_sums.values():
                self._gradient.add(sums)

    def _num_locations(self, output_shape: torch.Size) -> int:
        if self.geometry.is_convolution:
            return output_shape[-1] * output_shape[-2]
        return max(1, output_shape[1:-1].numel()) if len(output_shape) > 1 else 1
