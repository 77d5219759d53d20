"""Statistics of one layer over the mini-batch, or the accumulated micro-batches, of one optimisation step."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kfac_sua.preconditioner import correlations, factors
from kfac_sua.preconditioner.devices import on_one_device
from kfac_sua.preconditioner.factors import Factor
from kfac_sua.preconditioner.grouping import BlockLayout
from kfac_sua.preconditioner.layers import LayerGeometry
from kfac_sua.preconditioner.patch_rows import PatchRows, can_be_patch_rows, joined
from kfac_sua.preconditioner.pixels import to_locations
from kfac_sua.preconditioner.precision import at_least_float32

MAX_KEPT_ROWS = 16384
"""Rows that the Woodbury form may factorise: a matrix of 1 GiB in float32. ``auto`` never comes near."""


@dataclass
class MomentAccumulator:
    """Sum of Gram matrices, kept as rows while these are few (see ``cost``) and folded into dense blocks beyond.

    Args:
        max_rows: Rows to keep at most before folding.
    """

    max_rows: int
    rows: list[Tensor | PatchRows] = field(default_factory=list)
    blocks: Tensor | None = None

    @property
    def num_rows(self) -> int:
        """Rows kept."""
        return sum(_num_rows(part) for part in self.rows)

    def has_room(self, num_rows: int) -> bool:
        """Whether so many more rows may be kept."""
        return self.blocks is None and self.num_rows + num_rows <= self.max_rows

    def add(self, rows: Tensor) -> None:
        """Add rows, ``[num_blocks, n, d]``, to be kept if there is room."""
        if self.has_room(rows.shape[1]):
            self.rows.append(rows.clone())  # they may be a view of a buffer that the caller goes on using
        else:
            self.add_moment(factors.gram(rows))

    def keep(self, patches: PatchRows) -> None:
        """Add the patches of a convolution without groups, for which there must be room."""
        self.rows.append(patches)

    def add_moment(self, blocks: Tensor) -> None:
        """Add a Gram matrix, ``[num_blocks, d, d]``, which the accumulator may go on to change."""
        self._fold_kept()
        self.blocks = blocks if self.blocks is None else self.blocks.add_(blocks)

    def factor(self, normaliser: float) -> Factor:
        """Return the accumulated moment times ``normaliser``."""
        root = normaliser**0.5
        if self.blocks is not None:
            return Factor(blocks=self.blocks.mul_(normaliser))
        patches = [part for part in self.rows if isinstance(part, PatchRows)]
        if len(patches) == len(self.rows) and len({part.pixels.shape[:2] for part in patches}) == 1:
            return Factor(patches=joined(patches).scaled(root))
        return Factor(rows=torch.cat([_as_tensor(part) for part in self.rows], dim=1).mul_(root))

    def _fold_kept(self) -> None:
        kept, self.rows = self.rows, []
        for part in kept:
            self.add_moment(factors.gram(_as_tensor(part)))


def _num_rows(rows: Tensor | PatchRows) -> int:
    return rows.num_rows if isinstance(rows, PatchRows) else rows.shape[1]


def _as_tensor(rows: Tensor | PatchRows) -> Tensor:
    return rows.rows()[None] if isinstance(rows, PatchRows) else rows


@dataclass
class LayerFactors:
    """Both sides of a layer's Fisher block ``scale · activation ⊗ gradient``, normalised over examples.

    Args:
        activation: Activation factor.
        gradient: Gradient factor.
        scale: S under ``expand``, 1 under ``reduce``.
        num_rows: Rows it was measured from, its weight beside those of other processes; 0 where that is over.
    """

    activation: Factor
    gradient: Factor
    scale: float
    num_rows: int = 0

    def is_finite(self) -> Tensor:
        """Whether no entry is NaN or infinite, as a 0-d bool tensor on the device."""
        return self.activation.traces().isfinite().all() & self.gradient.traces().isfinite().all()


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
        self._activation, self._gradient = (MomentAccumulator(most) for most in self.max_rows)
        self._inputs: list[Tensor] = []
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
            sums = factors.reduced_activation_rows(inputs, self.geometry, self.layout)
            current.input_sums = sums if current.input_sums is None else current.input_sums + sums
        else:
            self._add_activations(inputs)
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
        rows = factors.gradient_rows(grads, self.layout, reduce=self.reduce)
        if not self.reduce:
            self._gradient.add(rows)
            return
        sums = self._passes[call.index].output_grad_sums
        sums[sample] = sums[sample] + rows if sample in sums else rows

    def factors(self, *, grads_of_mean_loss: bool, loss_scale: float = 1.0) -> LayerFactors | None:
        """Return the normalised factors, or ``None`` if the layer took no part in the loss.

        Args:
            grads_of_mean_loss: The output gradients belong to the *mean* over examples, so they are multiplied by
                the number of examples (of all micro-batches together).
            loss_scale: What the loss of these output gradients was multiplied with; they are divided by it.

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
        while self._inputs:
            moment = correlations.patch_moment(self._inputs.pop(), self.geometry, self.layout)
            self._activation.add_moment(moment)
        if self.reduce:
            self._fold_passes()
            num_rows = num_examples  # every example is one row
        kept = max(self._activation.num_rows, self._gradient.num_rows)
        if kept > MAX_KEPT_ROWS:
            raise RuntimeError(
                f"Layer {self.name!r}: inverse_method=low_rank would factorise a {kept}×{kept} matrix; use "
                f"inverse_method=auto, which takes the smaller side."
            )
        return LayerFactors(
            activation=self._activation.factor(1 / (num_rows * self.layout.identity_taps)),
            gradient=self._gradient.factor(per_gradient / num_rows),
            scale=num_rows / num_examples,
            num_rows=num_rows,
        )

    def _add_activations(self, inputs: Tensor) -> None:
        """Add the activation rows of one call under ``expand``, in the form that needs the least work."""
        geometry, layout, moment = self.geometry, self.layout, self._activation
        num_rows = factors.num_activation_rows(inputs, geometry, layout)
        if self._max_sampled_rows is not None and num_rows > self._max_sampled_rows:
            for rows in factors.sampled_activation_rows(inputs, geometry, layout, self._max_sampled_rows):
                moment.add(rows)
        elif can_be_patch_rows(geometry, layout) and moment.has_room(num_rows):
            moment.keep(PatchRows.read(inputs, geometry))
        elif correlations.can_correlate(geometry, layout) and not moment.has_room(num_rows):
            self._correlate(inputs)
        else:
            for rows in factors.activation_rows(inputs, geometry, layout):
                moment.add(rows)

    def _correlate(self, inputs: Tensor) -> None:
        """Add the moment of patches; after the backward pass, where a copy of the inputs is smaller than the moment.

        Until then the activations of all layers are alive, which is when a training step needs most memory.
        """
        num_blocks, width = self.layout.activation_blocks
        if sum(kept.numel() for kept in self._inputs) + inputs.numel() <= num_blocks * width**2:
            self._inputs.append(inputs.clone())
        else:
            self._activation.add_moment(correlations.patch_moment(inputs, self.geometry, self.layout))

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


def finite_layers(layer_factors: Iterable[LayerFactors]) -> list[bool]:
    """Return for each layer whether its factors are finite, with one host synchronisation for all."""
    flags = [factors.is_finite() for factors in layer_factors]
    return torch.stack(on_one_device(flags)).tolist() if flags else []
