"""The calls of one layer over the mini-batch, or the accumulated micro-batches, of one optimisation step.

Each call of the layer is measured separately, and *counted* once it is known that its weight gradient is part of
``.grad`` (see ``model.recorder``). Calls that are not counted have no effect. What is kept of inputs and output
gradients is up to the structure (see ``structures``).
"""

import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kfac_sua.preconditioner.factors import LayerMeasurement
from kfac_sua.preconditioner.forms.accumulator import Scalings
from kfac_sua.preconditioner.forms.unfold import to_locations
from kfac_sua.preconditioner.geometry import LayerGeometry
from kfac_sua.preconditioner.kronecker import LayerInverse
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


class CallRows(ABC):
    """What a structure keeps of one call of a layer."""

    @abstractmethod
    def read_inputs(self, inputs: Tensor) -> None:
        """Read the inputs, ``[n, h, w, conv_groups · in_channels]``, in float32 at least; they may change afterwards.

        A linear layer has its extra dimensions as locations: ``[n, locations, 1, in_features]``.
        """

    @abstractmethod
    def read_output_grads(self, output_grads: Tensor, sample: int) -> None:
        """Read the output gradients, ``[n, h', w', conv_groups · out_channels]``; they may change afterwards.

        Args:
            output_grads: Gradients with respect to the call's output, in float32 at least.
            sample: Index of the backward pass: one, or one per class for the ``exact`` Fisher.
        """

    @abstractmethod
    def forget_output_grads(self) -> None:
        """Forget the output gradients that have been read."""


@dataclass(eq=False)
class Call:
    """One call of a layer.

    Args:
        model_pass: The model's forward pass that it belongs to.
        num_examples: First dimension of its inputs.
        num_locations: Output locations per example.
        rows: What is kept of it.
        inputs: Its inputs until they are read, ``[n, h, w, channels]``; ``None`` afterwards.
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
    rows: CallRows
    inputs: Tensor | None = None
    samples: set[int] = field(default_factory=set)
    counted_in: object = None
    is_forgotten: bool = False
    task: int | None = None
    compared: Tensor | None = None

    def forget_output_grads(self) -> None:
        """Forget the output gradients of a backward pass that did not add a weight gradient to ``.grad``."""
        self.rows.forget_output_grads()
        self.samples.clear()


@dataclass
class CountedPass:
    """The counted calls of one forward pass of the model: its examples, and the locations of all calls together."""

    model_pass: ModelPass
    num_examples: int
    num_locations: int = 0


class LayerStatistics(ABC):
    """Collects inputs and output gradients of one layer, and hands those of the counted calls to a structure.

    A layer that is called several times within one forward pass shares its weight over the calls, as a convolution
    shares it over locations: the locations of all calls count together. Several forward passes before one step
    (gradient accumulation) are more examples.

    Args:
        name: The layer's name, for messages.
        geometry: Its geometry.

    A call that is not counted yet is kept only by autograd's graph: when no backward pass can reach it any more, its
    memory is freed.

    Attributes:
        step: An object that identifies the step that calls are counted in.
        was_empty: Whether the layer was called without examples.
    """

    def __init__(self, name: str, geometry: LayerGeometry) -> None:
        self.name = name
        self.geometry = geometry
        self._calls: weakref.WeakValueDictionary[int, Call] = weakref.WeakValueDictionary()  # by their number
        self._num_calls = 0
        self.clear()

    # --- what a structure decides -----------------------------------------------------------------------------------

    @abstractmethod
    def _new_rows(self) -> CallRows:
        """Return what is to be kept of a call, before anything has been read."""

    @abstractmethod
    def _absorb(self, calls: Sequence[Call]) -> None:
        """Take the rows of calls that count, in their order; the calls will not be read again."""

    @abstractmethod
    def _forget_absorbed(self) -> None:
        """Forget the rows of all counted calls."""

    @abstractmethod
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
        """Return what the counted calls say of the layer's Fisher block.

        Args:
            num_examples: Examples of all passes.
            num_rows: Output locations of all examples.
            num_averaged: Examples that the loss was averaged over, 1 if it was not; the output gradients times this are
                those of the per-example loss.
            loss_scale: What the loss was multiplied by; the output gradients are to be divided by it.
            scalings: Collects the multiplications that may be carried out for several layers at once.
            inverse: The layer's inverse at hand, from which an iteration may start; ``None`` before the first.
        """

    # --- what is the same for all -----------------------------------------------------------------------------------

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
        self._forget_absorbed()
        self._passes: dict[int, CountedPass] = {}
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
            waits: Keep the inputs, and read them when an output gradient arrives.

        Returns:
            The call, for :meth:`add_output_grads` and :meth:`count`. The caller must keep a reference to it.
        """
        inputs = to_locations(inputs.detach(), self.geometry)
        call = Call(model_pass, inputs.shape[0], self._num_locations(output_shape), self._new_rows(), inputs)
        if not waits:
            self._read_inputs(call)
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
        self._read_inputs(call)
        call.samples.add(sample)
        grads = to_locations(at_least_float32(output_grads.detach()), self.geometry)
        call.rows.read_output_grads(grads, sample)

    @torch.no_grad()
    def count(self, calls: Iterable[Call]) -> None:
        """Count calls whose output gradients have arrived: their gradient is part of ``.grad``.

        Rows are added in the order of the calls, as those of several processes with a call each.
        """
        chosen = set(map(id, calls))
        counted = []
        for call in [call for call in self.open_calls if id(call) in chosen]:
            call.counted_in = self.step
            one = self._passes.setdefault(call.model_pass.index, CountedPass(call.model_pass, call.num_examples))
            if one.num_examples != call.num_examples:
                self._unequal_examples = (
                    min(one.num_examples, call.num_examples),
                    max(one.num_examples, call.num_examples),
                )
                continue
            one.num_locations += call.num_locations
            counted.append(call)
        self._absorb(counted)

    def factors(
        self,
        *,
        grads_of_mean_loss: bool,
        loss_scale: float = 1.0,
        scalings: Scalings | None = None,
        inverse: LayerInverse | None = None,
    ) -> LayerMeasurement | None:
        """Return what the counted calls say of the layer's Fisher block, or ``None`` if there are none.

        Args:
            grads_of_mean_loss: Whether the output gradients are those of the *mean* over examples; they are then
                multiplied by the number of examples (of all micro-batches together).
            loss_scale: What the loss was multiplied by; the output gradients are divided by it.
            scalings: Collects the multiplications that are still needed, so that the caller carries them out for
                several layers at once; ``None`` to multiply here.
            inverse: The layer's inverse at hand.

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
        own = Scalings() if scalings is None else scalings
        measured = self._measured(
            num_examples,
            num_rows,
            num_averaged=num_examples if grads_of_mean_loss else 1,
            loss_scale=loss_scale,
            scalings=own,
            inverse=inverse,
        )
        if scalings is None:
            own.carry_out()
        return measured

    def _read_inputs(self, call: Call) -> None:
        """Read the inputs of a call, unless they have been read."""
        if call.inputs is not None:
            inputs, call.inputs = at_least_float32(call.inputs), None
            call.rows.read_inputs(inputs)

    def _num_locations(self, output_shape: torch.Size) -> int:
        if self.geometry.is_convolution:
            return output_shape[-1] * output_shape[-2]
        return max(1, output_shape[1:-1].numel()) if len(output_shape) > 1 else 1
