"""Hooks that record layer inputs and output gradients, only while statistics are due.

One forward hook per layer, and one hook on the node of autograd's graph that computed its output: it sees the gradient
of the output as the layer returned it, also when it is modified in place afterwards (``relu_``, ``out += shortcut``),
where full backward hooks raise. Which of it counts is decided in ``recorder``.
"""

import bisect
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from kfac_sua.preconditioner.model.autograd import (
    NO_TASK,
    current_task,
    is_transformed,
    node_at_work,
    num_nodes_made,
)
from kfac_sua.preconditioner.model.changes import CURE
from kfac_sua.preconditioner.model.compiled import never_traced
from kfac_sua.preconditioner.model.gradient_check import judge
from kfac_sua.preconditioner.model.recorder import LayerRecorder
from kfac_sua.preconditioner.ordinary import ordinary
from kfac_sua.preconditioner.precision import factor_precision
from kfac_sua.preconditioner.statistics import Call, LayerStatistics, ModelPass

Phase = Callable[[str], AbstractContextManager[Any]]


MOST_PASSES = 1000
"""Forward passes that are remembered between two steps, for checkpoints that are still to be run again."""


@dataclass
class PhaseSource:
    """Gives the context that the time of a named piece of work is accounted to; shared, so that it can be replaced."""

    phase: Phase


@dataclass
class _RecordedOutput:
    recorder: LayerRecorder
    edge: GradientEdge
    call: Call
    shape: torch.Size


@dataclass(frozen=True)
class Settled:
    """What the passes of a step have come to.

    Args:
        gone: Layers whose gradient was thrown away, and with it what was recorded.
        empty: Layers that were called with no examples.
        flags: ``[3, layers]``, in the layers' order: whether a gradient is not the sum over the recorded calls; whether
            it is not in ``.grad`` any more; whether it was added to one that had been preconditioned.
    """

    gone: set[str]
    empty: set[str]
    flags: Tensor


class Capture:
    """Feeds the inputs and output gradients of hooked layers to their statistics.

    Args:
        model: The model whose forward call delimits one pass.
        modules: Layer name to module.
        statistics: Layer name to the statistics it feeds.
        phases: Where the time of the statistics is accounted.
        from_training_loss: Take output gradients from the backward passes that reach ``.grad`` (empirical Fisher);
            otherwise only from :meth:`backward`.

    Attributes:
        enabled: Whether passes are recorded.
        is_paused: Whether passes that would be are left out.
    """

    def __init__(
        self,
        model: nn.Module,
        modules: Mapping[str, nn.Module],
        statistics: Mapping[str, LayerStatistics],
        phases: PhaseSource,
        *,
        from_training_loss: bool,
    ) -> None:
        self.enabled = False
        self.is_paused = False
        self.was_compiled = False
        self._phases = phases
        self._from_training_loss = from_training_loss
        self._outputs: list[_RecordedOutput] = []
        self._sampled: list[Call] = []  # nothing else may hold on to them until the step
        self._passes: list[ModelPass] = []
        self._num_passes = 0
        self._is_pass_over = True
        self._handles = [model.register_forward_pre_hook(_PassHook(self), with_kwargs=True)]
        self.recorders: dict[str, LayerRecorder] = {}
        for name, module in modules.items():
            recorder = LayerRecorder(module, statistics[name], self, from_training_loss=from_training_loss)
            self.recorders[name] = recorder
            # Before hooks that are there already: they may return another output than the layer's own.
            hook = _LayerHook(self, recorder)
            self._handles.append(module.register_forward_hook(hook, prepend=True, with_kwargs=True))

    def clear(self) -> None:
        """Forget what was recorded for a step, but not the calls whose backward pass is still to come."""
        self._outputs.clear()
        self._sampled.clear()
        del self._passes[:-1]
        self._is_pass_over = True
        for recorder in self.recorders.values():
            recorder.clear()

    def forget(self) -> None:
        """Forget everything recorded."""
        self.clear()
        for recorder in self.recorders.values():
            recorder.statistics.forget_open()

    def settle(self, *, needs_gradients: bool) -> Settled:
        """Decide which calls count, at the end of a step.

        Args:
            needs_gradients: Calls whose gradient is not in ``.grad`` any more do not.
        """
        gone = set()
        for name, recorder in self.recorders.items():
            recorder.count_sampled()
            is_counted = self._from_training_loss and recorder.statistics.num_counted > 0
            if needs_gradients and is_counted and recorder.weight.grad is None:
                recorder.forget_counted()
                gone.add(name)
        recorders = self.recorders.values()
        empty = {name for name, recorder in self.recorders.items() if recorder.statistics.was_empty}
        judged = judge([one.check for one in recorders], [one.weight for one in recorders])  # [2, layers]
        olds = [one.old_grad for one in recorders]
        are_old = torch.zeros_like(judged[0])  # [layers]
        if any(one is not False for one in olds):  # not in loops that zero gradients as most do
            are_old = torch.stack([torch.as_tensor(one, device=judged.device) for one in olds])
        return Settled(gone, empty, torch.cat([judged, are_old[None]]))

    def remove(self) -> None:
        """Remove every hook from the model, and forget what they recorded."""
        self.enabled = self.is_paused = False
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.forget()

    def backward(self, outputs: Tensor, cotangents: Iterator[Tensor]) -> None:
        """Send cotangents backward from ``outputs`` to the recorded layers, without touching any ``.grad``.

        The graph is retained, so the training loss can be differentiated from the same forward pass. No weight
        gradient is computed on the way.

        Raises:
            RuntimeError: If no forward pass has been recorded since the last call.
        """
        recorded, self._outputs = self._outputs, []
        if not recorded:
            raise RuntimeError(
                "fisher_backward() found no forward pass recorded since its last call: run the model with gradients "
                "enabled and call it once, on the outputs of that pass."
            )
        edges = [output.edge for output in recorded]
        self._sampled += [output.call for output in recorded]
        for sample, cotangent in enumerate(cotangents):
            grads: Sequence[Tensor | None] = torch.autograd.grad(
                outputs, edges, cotangent, retain_graph=True, allow_unused=True
            )
            with self._phases.phase("statistics"), factor_precision():
                for output, grad in zip(recorded, grads, strict=True):
                    if grad is not None:
                        output.recorder.statistics.add_output_grads(grad.reshape(output.shape), output.call, sample)
        self.end_pass()

    @never_traced
    def begin_pass(self, inputs: Any) -> None:
        """Note that the model is entered anew, with these arguments."""
        if current_task() == NO_TASK:  # inside a backward pass, a checkpoint enters it again
            # Without gradients it may be that of a checkpoint, whose node was the last to be made.
            start = num_nodes_made() - (not torch.is_grad_enabled())
            self._begin_pass(start, _num_examples(inputs))

    def end_pass(self) -> None:
        """Let the next call begin a new forward pass: a backward pass has been counted since the last one."""
        self._is_pass_over = True

    @never_traced
    def record(self, recorder: LayerRecorder, weight: Any, inputs: Any, output: Any) -> None:
        """Record one call of a layer, if it is of a kind whose gradient reaches the layer's ``.grad``.

        Calls without gradients are not, nor those with a frozen weight or one that ``torch.func.functional_call``
        lends, nor those inside transformations of ``torch.func``.
        """
        if self.enabled and current_task() != NO_TASK:
            self._follow_checkpoint()
        elif self.enabled and self._is_pass_over and not torch.is_grad_enabled():
            self._begin_pass(num_nodes_made() - 1, None)  # inside a checkpoint, perhaps, whose node was the last made
        if not (torch.is_grad_enabled() and isinstance(output, Tensor) and output.requires_grad):
            return
        if not isinstance(weight, nn.Parameter) or not weight.requires_grad or is_transformed():
            return
        edge = get_gradient_edge(_computed(output))
        if self.is_paused:
            edge.node.register_prehook(lambda grads: recorder.excuse())
        if not self.enabled or (current_task() != NO_TASK and not self._from_training_loss):
            return  # a checkpoint runs the layer again: gradients were, or will be, sent to the call before
        name, shape = recorder.statistics.name, output.shape
        inputs = ordinary(inputs, name).to(output.device)
        if not inputs.numel() or not output.numel():
            recorder.statistics.was_empty = True  # no examples, and nothing to add to any sum
            return
        if weight.shape != recorder.weight_shape:
            raise RuntimeError(
                f"Layer {name!r} has got a weight of shape {list(weight.shape)} since the preconditioner was made, "
                f"instead of {list(recorder.weight_shape)}; {CURE}."
            )
        with self._phases.phase("statistics"), factor_precision():
            call = recorder.add_call(inputs, shape, self._current_pass())
        index = edge.output_nr
        if not self._from_training_loss:
            self._outputs.append(_RecordedOutput(recorder, edge, call, shape))

        def on_gradient(grads: Sequence[Tensor | None]) -> None:  # must not refer to the node that refers to it
            grad = grads[index]
            if grad is None or not self.enabled or not recorder.is_accumulated:
                return
            with torch.no_grad(), self._phases.phase("statistics"), factor_precision():
                recorder.receive(call, ordinary(grad, name).reshape(shape))

        edge.node.register_prehook(on_gradient)

    def _current_pass(self) -> ModelPass:
        """Return the model's forward pass that a call belongs to.

        A call inside a backward pass belongs to the forward pass whose checkpoint is run again: that in which the node
        at work was made. Loops that call layers without the model begin a new pass after each backward pass.
        """
        if current_task() != NO_TASK and self._passes:
            made = node_at_work()
            return next((one for one in reversed(self._passes) if one.start <= made), self._passes[0])
        if self._is_pass_over:
            self._begin_pass(num_nodes_made(), None)
        return self._passes[-1]

    def _begin_pass(self, start: int, num_examples: int | None) -> None:
        del self._passes[:-MOST_PASSES]
        self._passes.append(ModelPass(self._num_passes, num_examples, start))
        self._num_passes += 1
        self._is_pass_over = False

    def _follow_checkpoint(self) -> None:
        """Let the nodes that are made from now on, in a checkpoint that is run again, belong to its forward pass.

        Checkpoints inside it make nodes of their own, the last of them just now where gradients are off.
        """
        start = num_nodes_made() - (not torch.is_grad_enabled())
        again = dataclasses.replace(self._current_pass(), start=start)
        if self._passes and self._passes[-1].index != again.index:
            bisect.insort(self._passes, again, key=lambda one: one.start)


def num_captures_on(model: nn.Module) -> int:
    """Return how many captures record passes of a model or of modules in it: one for each preconditioner."""
    return sum(isinstance(hook, _PassHook) for module in model.modules() for hook in module._forward_pre_hooks.values())


def _computed(output: Tensor) -> Tensor:
    """Return what a layer's output is a view of, if it is another shape of it, or the output itself.

    An in-place operation on a view takes the node that made the view out of autograd's graph, but not that of its base:
    ``nn.Linear`` returns such a view for inputs of more than two dimensions.
    """
    base = output._base
    return output if base is None or base.numel() != output.numel() or not base.requires_grad else base


def _num_examples(values: Any) -> int | None:
    """Return the first dimension of the first tensor in nested arguments; ``None`` if there is none."""
    if isinstance(values, Tensor):
        return None if values.is_nested or not values.dim() else values.shape[0]
    if isinstance(values, Mapping):
        values = list(values.values())
    if not isinstance(values, list | tuple):
        return None
    return next((count for one in values if (count := _num_examples(one)) is not None), None)


class _ModelHook:
    """A hook that belongs to one model, which must not follow it elsewhere.

    Copies and pickles of the model get a hook of the standard library that does nothing, so that they can be loaded
    where this package is not installed.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return _InertHook()

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (nullcontext(), "__exit__")

    @property
    def __name__(self) -> str:
        """What only ``torch.jit.script`` asks for, which would compile the hook."""
        raise AttributeError(
            "torch.jit.script cannot compile the hooks of a preconditioner: call preconditioner.remove_hooks() first, "
            "before the model is copied, or script a new model that was given load_state_dict(model.state_dict()); "
            "torch.jit.trace, torch.export and torch.fx take the model as it is"
        )


class _InertHook(_ModelHook):
    """What a copied model has in the place of a hook."""

    def __call__(self, *args: Any) -> None:
        del args


# torch.compile may trace these hooks (see `compiled`): so they store nothing but constants, and read `enabled` first.
class _PassHook(_ModelHook):
    def __init__(self, capture: Capture) -> None:
        self._capture = capture

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        del module
        if self._capture.enabled:
            if torch.compiler.is_compiling():
                self._capture.end_pass()
            else:
                self._capture.begin_pass((args, kwargs))


class _LayerHook(_ModelHook):
    def __init__(self, capture: Capture, recorder: LayerRecorder) -> None:
        self._capture = capture
        self._recorder = recorder

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if getattr(module, "_is_replica", False):
            raise RuntimeError(
                f"Layer {self._recorder.statistics.name!r} runs in a copy that nn.DataParallel made, which cannot be "
                f"recorded; use DistributedDataParallel, with one process per device."
            )
        capture = self._capture
        if (capture.enabled or capture.is_paused) and module is self._recorder.module:
            inputs = args[0] if args else kwargs["input"]
            if torch.compiler.is_compiling():
                capture.was_compiled = True
            capture.record(self._recorder, module._parameters.get("weight"), inputs, output)
