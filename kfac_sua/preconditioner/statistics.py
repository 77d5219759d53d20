"""Statistics of one layer over the mini-batch, or the accumulated micro-batches, of one optimisation step."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from kfac_sua.preconditioner.factors import LayerFactors
from kfac_sua.preconditioner.forms import moments
from kfac_sua.preconditioner.forms.accumulator import ActivationAccumulator, MomentAccumulator, Scalings
from kfac_sua.preconditioner.forms.unfold import to_locations
from kfac_sua.preconditioner.geometry import BlockLayout, LayerGeometry
from kfac_sua.preconditioner.precision import at_least_float32

MAX_KEPT_ROWS = 16384
"""Rows that the Woodbury form may factorise: a matrix of 1 GiB in float32. ``auto`` never comes near."""


@dataclass
class _Pass:
    """One forward pass through a layer: its examples, and the locations of all its calls joined.

    Under ``reduce`` it also holds the per-example sums over these locations: of the inputs, and of the output gradients
    per backward pass (one, or one per class for the ``exact`` Fisher).
    """

    num_examples: int
    num_locations: int = 0
    input_sums: Tensor | None = None
    output_grad_sums: dict[int, Tensor] = field(default_factory=dict)


@dataclass
class Call:
    """One call of a layer.

    Args:
        index: Index of the forward pass through the layer that it belongs to.
        samples: Backward passes whose output gradient has arrived.
    """

    index: int
    samples: set[int] = field(default_factory=set)


class LayerStatistics:
    """Collects inputs and output gradients of one layer and turns them into normalised factors.

    A layer that is called several times within one forward pass shares its weight over the calls, exactly as a
    convolution shares it over locations: the calls' locations are joined. Several forward passes before one step
    (gradient accumulation) are more examples.

    Args:
        name: The layer's name, for messages.
        geometry: Its geometry.
        layout: Its block layout.
        reduce: ``weight_sharing`` is ``reduce``.
        max_activation_rows: Rows of the activation factor kept at most before it is formed densely.
        max_gradient_rows: The same for the gradient factor.
        sampled_rows: Rows of the activation factor measured at most per call; ``None`` for all.
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
        self.clear()

    def clear(self) -> None:
        """Forget everything collected."""
        most_activation, most_gradient = self.max_rows
        self._activation = ActivationAccumulator(most_activation, self.geometry, self.layout, self._max_sampled_rows)
        self._gradient = MomentAccumulator(most_gradient)
        self._passes: list[_Pass] = []
        self._model_pass = -1
        self._calls: list[Call] = []

    @torch.no_grad()
    def add_inputs(self, inputs: Tensor, output_shape: torch.Size, model_pass: int) -> Call:
        """Record one call.

        Args:
            inputs: The layer's inputs.
            output_shape: Shape of its outputs.
            model_pass: Index of the model's forward pass.

        Returns:
            The call, to hand to :meth:`add_output_grads`.
        """
        inputs = to_locations(at_least_float32(inputs.detach()), self.geometry)
        current = self._begin_call(inputs.shape[0], model_pass)
        current.num_locations += self._num_locations(output_shape)
        call = Call(len(self._passes) - 1)
        self._calls.append(call)
        if self.reduce:
            sums = moments.reduced_activation_rows(inputs, self.geometry, self.layout)
            current.input_sums = sums if current.input_sums is None else current.input_sums + sums
        else:
            self._activation.add_inputs(inputs)
        return call

    @property
    def num_examples(self) -> int:
        """Examples in all forward passes recorded."""
        return sum(one.num_examples for one in self._passes)

    @property
    def is_awaiting(self) -> bool:
        """Whether a call has been recorded whose output gradient has not arrived."""
        return any(not call.samples for call in self._calls)

    @torch.no_grad()
    def add_output_grads(self, output_grads: Tensor, call: Call, sample: int = 0) -> None:
        """Record the output gradients of one call.

        Args:
            output_grads: Gradient with respect to the call's output.
            call: What :meth:`add_inputs` returned for it.
            sample: Index of the backward pass (several for the ``exact`` Fisher), so that ``reduce`` sums over the
                calls of one backward only.

        Raises:
            RuntimeError: If the call has had this output gradient before.
        """
        if sample in call.samples:
            raise RuntimeError(
                f"Layer {self.name!r}: a second backward pass reached one forward pass while statistics were recorded; "
                f"add losses up for one backward pass, and run passes that are not the training step's inside "
                f"preconditioner.paused()."
            )
        call.samples.add(sample)
        grads = to_locations(at_least_float32(output_grads.detach()), self.geometry)
        rows = moments.gradient_rows(grads, self.layout, reduce=self.reduce)
        if not self.reduce:
            self._gradient.add(rows)
            return
        sums = self._passes[call.index].output_grad_sums
        sums[sample] = sums[sample] + rows if sample in sums else rows

    def factors(
        self, *, grads_of_mean_loss: bool, loss_scale: float = 1.0, scalings: Scalings | None = None
    ) -> LayerFactors | None:
        """Return the normalised factors, or ``None`` if the layer took no part in the loss.

        Args:
            grads_of_mean_loss: The output gradients belong to the *mean* over examples, so they are multiplied by
                the number of examples (of all micro-batches together).
            loss_scale: What the loss of these output gradients was multiplied with; they are divided by it.
            scalings: Where to leave what is to be multiplied for it, to be carried out for several layers at once;
                ``None`` multiplies here.

        Raises:
            RuntimeError: If only some of the layer's calls received an output gradient.
        """
        num_awaiting = sum(not call.samples for call in self._calls)
        if num_awaiting == len(self._calls):
            return None
        if num_awaiting:
            raise RuntimeError(
                f"Layer {self.name!r}: no output gradient arrived for {num_awaiting} of its {len(self._calls)} "
                f"calls since the last step, so its statistics would be wrong; run forward passes that no training "
                f"loss follows under torch.no_grad() or inside preconditioner.paused(), and call "
                f"preconditioner.discard() where a mini-batch is abandoned."
            )
        num_examples = self.num_examples
        num_rows = sum(one.num_examples * one.num_locations for one in self._passes)
        per_gradient = (num_examples if grads_of_mean_loss else 1) ** 2 / loss_scale**2
        self._activation.fold_inputs()
        if self.reduce:
            self._fold_passes()
            num_rows = num_examples  # every example is one row
        kept = max(self._activation.num_rows, self._gradient.num_rows)
        if kept > MAX_KEPT_ROWS:
            raise RuntimeError(
                f"Layer {self.name!r}: inverse_method=low_rank would factorise a {kept}×{kept} matrix; use "
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

    def _begin_call(self, num_examples: int, model_pass: int) -> _Pass:
        """Return the pass a call belongs to: a new one after the model was entered anew, or after a backward pass."""
        if model_pass != self._model_pass or not self.is_awaiting:
            self._model_pass = model_pass
            self._passes.append(_Pass(num_examples))
        current = self._passes[-1]
        if num_examples != current.num_examples:
            raise RuntimeError(
                f"Layer {self.name!r} was called with {current.num_examples} and then with {num_examples} examples "
                f"within one forward pass; statistics over such calls are not defined, list it in skip."
            )
        return current

    def _fold_passes(self) -> None:
        """Turn the sums of every pass into rows: inputs averaged, output gradients summed over locations."""
        for one in self._passes:
            assert one.input_sums is not None
            self._activation.add(one.input_sums / one.num_locations)
            for sums in one.output_grad_sums.values():
                self._gradient.add(sums)

    def _num_locations(self, output_shape: torch.Size) -> int:
        if self.geometry.is_convolution:
            return output_shape[-1] * output_shape[-2]
        return max(1, output_shape[1:-1].numel()) if len(output_shape) > 1 else 1
