"""A training step that is captured once and replayed: when it may be, and what the host still does at each replay.

Plain steps, which only apply the inverses at hand, carry out the same operations on the same tensors. On a GPU it takes
longer to launch these one by one from Python than to carry them out. A captured step is one launch.
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from kfac_sua.preconditioner.captured import refusals
from kfac_sua.preconditioner.captured.dependencies import Dependencies, parameters_device
from kfac_sua.preconditioner.captured.graph import CudaStepGraph, StepGraph
from kfac_sua.preconditioner.captured.host_state import HostState
from kfac_sua.preconditioner.captured.inspection import StepInspection
from kfac_sua.preconditioner.captured.optimizers import StepOptimizers
from kfac_sua.preconditioner.captured.recording import Grad, Recording
from kfac_sua.preconditioner.captured.values import plain_values, tensors
from kfac_sua.preconditioner.kfac import KroneckerPreconditioner
from kfac_sua.preconditioner.model.wrappers import bare_model

logger = logging.getLogger(__name__)

T = TypeVar("T")

WARM_UP_STEPS = 3
"""Plain steps taken eagerly before a capture: the first creates momentum and the like, the next two are compared."""

FEWEST_REPLAYS = 5
"""Replays that pay for a capture, which costs the host about as much as five eager steps."""

MOST_FUTILE_CAPTURES = 5
"""Captures in a row, each given up before it has paid, after which all steps stay eager."""

MOST_LEFTOVERS = 3
"""Eager steps that left tensors in the graph's memory, after which eager steps get memory of their own."""


class CapturedStep(Generic[T]):
    """Takes training steps, the plain ones by replaying a CUDA graph: one launch instead of hundreds.

    Around a function that takes one step on the tensors it is given::

        def train_step(inputs, labels):
            optimizer.zero_grad()
            loss = loss_function(model(inputs), labels)
            loss.backward()
            preconditioner.step()
            optimizer.step()
            return loss.detach()

        step = CapturedStep(train_step, model, optimizer, preconditioner)
        for inputs, labels in batches:
            loss = step(inputs, labels)

    Steps with statistics or a refresh call the function, and so do steps that an observer sees and all steps on the
    CPU. Among the others the first three call the function and the fourth captures it; each later step copies the
    mini-batch into the graph's inputs and replays it. The function and its results are those of an ordinary loop.
    Python does not run at a replay: the function must not count in Python, nor draw random numbers in Python or NumPy.

    After a replay the results of the function, every ``.grad`` and ``preconditioner.kl_scale`` are tensors of the
    graph. The next step writes over them, as it may write over those of an eager step: clone what you keep. Clip and
    log inside the function, on tensors.

    The learning rate may change at any time, outside the function. ``SGD``, ``Adam`` and ``AdamW`` made with
    ``fused=True`` read it from the device (in float32). With other optimizers a change of the learning rate captures
    the step anew. So does, with all optimizers, a change of any other number in their groups, or of anything else that
    a call would notice: addresses of parameters, buffers or inverses, shapes, frozen layers, modes, hooks, switches of
    precision. A mini-batch of another shape is taken eagerly, and captured if the next one has that shape too. A step
    that cannot be captured stays eager, with a warning that says why: see :attr:`why_eager` and the table in the
    documentation.

    Args:
        function: Takes one step, and calls ``preconditioner.step()`` once. Its arguments are tensors; a function
            without arguments reads its mini-batch at a position on the device, which it advances in place. Other
            tensors that it reads or writes must keep their addresses, as parameters do.
        model: The model, wrapped or not. If the function calls several models, a module that holds them all.
        optimizer: The optimizer that the function steps, or a sequence of several.
        preconditioner: The preconditioner that the function steps, made for the model or a part of it; ``None`` if
            nothing is preconditioned.
        graph: Captures and replays; by default CUDA graphs for a model on a CUDA device, and nothing elsewhere.

    Raises:
        ValueError: If the preconditioner belongs neither to the model nor to a part of it.

    Attributes:
        num_captures: Number of captures.
        num_replays: Number of steps that were replays.
    """

    def __init__(
        self,
        function: Callable[..., T],
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer],
        preconditioner: KroneckerPreconditioner | None = None,
        *,
        graph: StepGraph | None = None,
    ) -> None:
        self._function = function
        self._model = bare_model(model)
        if preconditioner is not None and all(preconditioner.model is not part for part in self._model.modules()):
            raise ValueError("The preconditioner was made for another model than the one given.")
        self._preconditioner = preconditioner
        self._optimizer_list = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
        self._given_graph = graph
        self._refusal = refusals.of_model(model, preconditioner)
        self.num_captures = self.num_replays = 0
        self._device: torch.device | None = None
        self._recording: Recording[T] | None = None
        self._inputs: tuple[Tensor, ...] | None = None
        self._last_eager: StepInspection | None = None
        self._last_numbers: list[Any] = []
        self._shapes: list[Any] | None = None
        self._other_shapes: list[Any] | None = None
        self._num_warm = self._num_futile = self._num_leftovers = 0

    @property
    def why_eager(self) -> str:
        """Why no step is captured; empty if plain steps are, or will be."""
        device = parameters_device(self._model)
        if self._given_graph is None and device.type != "cuda":
            return f"the model is on {device}, and steps are captured on CUDA devices"
        return self._refusal

    @property
    def is_captured(self) -> bool:
        """Whether a step is captured now. It is replayed until something that it depends on changes."""
        return self._recording is not None

    def __call__(self, *inputs: Tensor) -> T:
        """Take one step on a mini-batch.

        Args:
            inputs: The function's arguments, if it has any: tensors on the model's device.

        Returns:
            The result of the function; the next step may write over its tensors.

        Raises:
            TypeError: If an input is no tensor.
            RuntimeError: If the function changes a learning rate that is read from the device.
        """
        for value in inputs:
            if not isinstance(value, Tensor):
                raise TypeError(f"A captured step takes tensors, got {type(value).__name__}.")
            if value.requires_grad and not self.why_eager:
                self._refuse("an argument requires a gradient, which a replay would not leave in it")
        if self.why_eager:
            if self._recording is not None:
                self._give_up("the model's device")
            return self._function(*inputs)
        self._follow_device()
        is_plain = self._preconditioner is None or self._preconditioner.step_is_plain
        if not is_plain or not self._has_usual_shapes(inputs):
            return self._run(lambda: self._call(inputs))
        if self._recording is not None and (change := self._change(self._recording)):
            self._give_up(change)
        if self._recording is not None:
            return self._replay(self._recording, inputs)
        return self._warm_up_or_capture(inputs)

    # --- how a step is taken ----------------------------------------------------------------------------------------

    def _call(self, inputs: Sequence[Tensor]) -> T:
        """Call the function, with learning rates on the device where a graph reads them."""
        with self._optimizers.rates_on_device():
            return self._function(*inputs)

    def _run(self, function: Callable[[], T]) -> T:
        """Take a step eagerly, in the graph's memory if possible."""
        is_to_be_captured = self._recording is None and self._num_warm >= WARM_UP_STEPS - 1
        inspection = StepInspection(parameters_device(self._model)) if is_to_be_captured else None
        try:
            with inspection or nullcontext():
                result = self._graph.run(function, is_shared=self._num_leftovers < MOST_LEFTOVERS)
        except BaseException:
            self._let_go()  # what the step has left in the graph's memory is not known
            raise
        if inspection is not None:
            self._last_eager = inspection
        if self._recording is not None:
            grads = [parameter.grad for parameter in self._parameters() if parameter.grad is not None]
            if self._graph.has_left([*grads, *tensors(result)]):
                self._num_leftovers += 1
                self._give_up("what an eager step leaves in the graph's memory")
        return result

    def _warm_up_or_capture(self, inputs: tuple[Tensor, ...]) -> T:
        if self._num_warm < WARM_UP_STEPS - 1:
            self._num_warm += 1
            result = self._run(lambda: self._call(inputs))
            self._last_numbers = list(plain_values(result))
            return result
        if self._inputs is None:
            self._inputs = tuple(map(torch.empty_like, inputs))
        _fill(self._inputs, inputs)
        if self._num_warm < WARM_UP_STEPS:
            return self._run_judged(self._inputs)
        self._recording = self._captured(self._inputs)
        return self._run(lambda: self._call(inputs)) if self._recording is None else self._recording.result

    def _run_judged(self, inputs: tuple[Tensor, ...]) -> T:
        """Take a step eagerly, and decide from it and the step before whether the step can be captured."""
        step_before, numbers = self._last_eager, self._last_numbers
        state, reading, versions = self._host_state(), self._dependencies.read(), [one._version for one in inputs]
        result = self._run(lambda: self._call(inputs))
        inspection, self._last_numbers = self._last_eager, list(plain_values(result))
        assert step_before is not None
        assert inspection is not None
        kept = [*self._dependencies.tensors(), *state.kept_grads()]
        refusal = self._why_not(inspection, state) or refusals.of_step_after(inspection, step_before, kept)
        if [one._version for one in inputs] != versions:
            refusal = "it writes into its arguments"
        elif not refusal and self._last_numbers != numbers:
            refusal = "it returns a Python number that changes from step to step"
        if refusal:
            self._refuse(refusal)
        elif change := self._dependencies.changed(reading):
            self._count_futile(change)
        else:
            self._num_warm += 1
        return result

    def _captured(self, inputs: tuple[Tensor, ...]) -> Recording[T] | None:
        """Capture the coming step and take it by a first replay; ``None``, and nothing changed, if that fails."""
        self._optimizers.refresh_rates()  # now, as writing them would be captured otherwise
        inspection, state = StepInspection(parameters_device(self._model)), self._host_state()
        reading, parameters = self._dependencies.read(), self._parameters()

        def inspected() -> tuple[T, list[Tensor | None]]:
            with inspection:
                result = self._call(inputs)
            return result, [parameter.grad for parameter in parameters]

        reason, change, recording = "", "", None
        try:
            torch.clear_autocast_cache()  # an autocast region around the step has filled it with eager casts
            with self._optimizers.capturable():
                result, grads = self._graph.capture(inspected)
            reason = self._why_not(inspection, state)
            change = self._dependencies.changed(reading)
            if not reason and not change:
                pairs = [
                    Grad(parameter, before, after, is_read=before is not None and inspection.has_found(before))
                    for parameter, before, after in zip(parameters, state.grads, grads, strict=True)
                ]
                recording = Recording(inputs, result, pairs, reading, inspection, state.events_since)
                self._launch(recording)  # the capture's own Python has counted this step
        except RuntimeError as error:
            reason = refusals.of_failure(error)
            recording = None
        finally:
            torch.clear_autocast_cache()  # of casts that were captured, and perhaps never carried out
            if recording is None or not recording.num_replays:
                state.restore()
                self._let_go()
        if recording is not None:
            logger.info("Captured the plain step.")
            self.num_captures += 1
            return recording
        if reason:
            self._refuse(reason)
        else:
            self._count_futile(change)
        return None

    def _replay(self, recording: Recording[T], inputs: tuple[Tensor, ...]) -> T:
        """Replay the captured step, and do on the host what its Python would have done."""
        _fill(recording.inputs, inputs)
        self._optimizers.refresh_rates()
        self._launch(recording)
        if recording.num_replays == FEWEST_REPLAYS:
            self._num_futile = 0
        for grad in recording.grads:
            grad.put()
        if self._preconditioner is not None:
            self._preconditioner.events.update(recording.events)
            self._preconditioner.go_to_step(self._preconditioner.num_steps + 1)
        return recording.result

    def _launch(self, recording: Recording[T]) -> None:
        self._graph.replay()
        recording.num_replays += 1
        self.num_replays += 1

    # --- whether it may be captured, and replayed -------------------------------------------------------------------

    def _has_usual_shapes(self, inputs: Sequence[Tensor]) -> bool:
        """Return whether a mini-batch has the captured shapes: those of the first, or of two others in a row."""
        shapes = [(value.shape, value.dtype, value.device) for value in inputs]
        if self._shapes is None or shapes == self._shapes:
            self._shapes, self._other_shapes = shapes, None
            return True
        if shapes != self._other_shapes:
            self._other_shapes = shapes
            return False
        if self._recording is not None:
            self._give_up("the shape of the mini-batch")
        self._shapes, self._other_shapes, self._inputs = shapes, None, None
        return True

    def _change(self, recording: Recording[T]) -> str:
        """Return what a captured step depends on and has changed since; empty if nothing has."""
        if change := self._dependencies.changed(recording.reading):
            return change
        if not all(grad.fits() for grad in recording.grads):
            return "the gradients at hand before the step"
        freed = recording.found.freed()
        return f"a tensor that the function found and that has been freed since ({freed[0]})" if freed else ""

    def _why_not(self, inspection: StepInspection, before: HostState) -> str:
        """Return why a step that was inspected cannot be captured; empty if it can."""
        return refusals.of_step(inspection, before, self._model, self._optimizers, self._preconditioner)

    def _give_up(self, change: str) -> None:
        """Release the captured step, so that it is captured anew."""
        logger.info("The step is to be captured anew; what has changed is %s.", change)
        is_futile = self._recording is not None and self._recording.num_replays < FEWEST_REPLAYS
        self._let_go()
        if is_futile:
            self._count_futile(change)

    def _count_futile(self, change: str) -> None:
        """Count a capture that did not pay; after several, keep to eager steps."""
        self._num_futile += 1
        if self._num_futile == MOST_FUTILE_CAPTURES:
            self._refuse(
                f"{MOST_FUTILE_CAPTURES} captures in a row were given up within {FEWEST_REPLAYS} replays, as this "
                f"keeps changing: {change}"
            )

    def _refuse(self, reason: str) -> None:
        """Keep to eager steps, with a warning."""
        logger.warning("The training step is not captured: %s.", reason)
        self._refusal = reason
        self._let_go()

    def _let_go(self) -> None:
        self._recording = self._inputs = self._last_eager = None
        self._num_warm = 0
        if self._device is not None:
            self._graph.release()

    # --- what it works on -------------------------------------------------------------------------------------------

    def _follow_device(self) -> None:
        """Set up the parts that belong to a device, at the first step and after the model has been moved."""
        device = parameters_device(self._model)
        if device == self._device:
            return
        if self._device is not None:
            self._let_go()  # the steps taken so far say nothing about another device
        self._device = device
        self._graph: StepGraph = self._given_graph or CudaStepGraph(device)
        self._optimizers = StepOptimizers(self._optimizer_list, device)
        self._dependencies = Dependencies(self._model, self._optimizers, self._preconditioner, device)

    def _host_state(self) -> HostState:
        return HostState(self._model, self._parameters(), self._optimizers, self._preconditioner)

    def _parameters(self) -> list[nn.Parameter]:
        """Return the parameters of the model and of the optimizers, once each."""
        return list({id(one): one for one in (*self._model.parameters(), *self._optimizers.parameters)}.values())


@torch.no_grad()
def _fill(kept: Sequence[Tensor], inputs: Sequence[Tensor]) -> None:
    for tensor, value in zip(kept, inputs, strict=True):
        tensor.copy_(value)
