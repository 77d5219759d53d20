"""Records layer inputs and output gradients through hooks, only while statistics are due.

One forward hook per layer, and one hook on the node of autograd's graph that computed its output: that node sees the
gradient of the output as the layer returned it, even if the output is modified in place afterwards (``relu_``,
``out += shortcut``), where full backward hooks raise. ``recorder`` decides which calls count.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from kfac_sua.preconditioner.model.autograd import NO_TASK, current_task, is_transformed
from kfac_sua.preconditioner.model.changes import CURE
from kfac_sua.preconditioner.model.compiled import never_traced
from kfac_sua.preconditioner.model.gradient_check import judge
from kfac_sua.preconditioner.model.hooks import LayerHook, PassHook
from kfac_sua.preconditioner.model.passes import ForwardPasses
from kfac_sua.preconditioner.model.recorder import LayerRecorder
from kfac_sua.preconditioner.phases import PhaseSource
from kfac_sua.preconditioner.precision import factor_precision
from kfac_sua.preconditioner.statistics import Call, LayerStatistics


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
        is_paused: Whether passes are left out that would be recorded otherwise.
        was_compiled: Whether a hook has been traced by a compiler, so that the model was compiled after it was hooked.
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
        self._sampled: list[Call] = []  # kept until the step, as nothing else refers to them
        self._passes = ForwardPasses()
        self._handles = [model.register_forward_pre_hook(PassHook(self), with_kwargs=True)]
        self.recorders: dict[str, LayerRecorder] = {}
        for name, module in modules.items():
            recorder = LayerRecorder(module, statistics[name], self, from_training_loss=from_training_loss)
            self.recorders[name] = recorder
            # Before hooks that are there already: they may return another output than the layer's own.
            hook = LayerHook(self, recorder)
            self._handles.append(module.register_forward_hook(hook, prepend=True, with_kwargs=True))

    def clear(self) -> None:
        """Forget what was recorded for a step, but not the calls whose backward pass is still to come."""
        self._outputs.clear()
        self._sampled.clear()
        self._passes.clear()
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
            needs_gradients: Leave out calls whose gradient is not in ``.grad`` any more.
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
        if any(one is not False for one in olds):  # not in loops that zero gradients, as most do
            are_old = torch.stack([torch.as_tensor(one, device=judged.device) for one in olds])  # [layers]
        return Settled(gone, empty, torch.cat([judged, are_old[None]]))  # [3, layers]

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
    def begin_pass(self, arguments: Any) -> None:
        """Note that the model is entered anew, with these arguments."""
        self._passes.begin(arguments)

    def end_pass(self) -> None:
        """Let the next call begin a new forward pass: a backward pass has been counted since the last one."""
        self._passes.end()

    @never_traced
    def record(self, recorder: LayerRecorder, weight: Any, inputs: Any, output: Any) -> None:
        """Record one call of a layer, if its gradient can reach the layer's ``.grad``.

        Not recorded are calls without gradients, calls with a frozen weight or one that ``torch.func.functional_call``
        lends, and calls inside transformations of ``torch.func``.
        """
        if self.enabled:
            self._passes.follow_checkpoints()
        if not (torch.is_grad_enabled() and isinstance(output, Tensor) and output.requires_grad):
            return
        if not isinstance(weight, nn.Parameter) or not weight.requires_grad or is_transformed():
            return
        edge = get_gradient_edge(_computed(output))
        if self.is_paused:
            edge.node.register_prehook(lambda grads: recorder.note_paused_pass())
        if not self.enabled or (current_task() != NO_TASK and not self._from_training_loss):
            return  # a checkpoint runs the layer again: gradients were, or will be, sent to the call before
        name, shape = recorder.statistics.name, output.shape
        inputs = _as_dense(inputs, name).to(output.device)
        if not inputs.numel() or not output.numel():
            recorder.statistics.was_empty = True  # no examples, and nothing to add to any sum
            return
        if weight.shape != recorder.weight_shape:
            raise RuntimeError(
                f"Layer {name!r} has got a weight of shape {list(weight.shape)} since the preconditioner was made, "
                f"instead of {list(recorder.weight_shape)}; {CURE}."
            )
        with self._phases.phase("statistics"), factor_precision():
            call = recorder.add_call(inputs, shape, self._passes.current())
        index = edge.output_nr
        if not self._from_training_loss:
            self._outputs.append(_RecordedOutput(recorder, edge, call, shape))

        def on_gradient(grads: Sequence[Tensor | None]) -> None:  # must not refer to the node that refers to it
            grad = grads[index]
            if grad is None or not self.enabled or not recorder.is_accumulated:
                return
            with torch.no_grad(), self._phases.phase("statistics"), factor_precision():
                recorder.receive(call, _as_dense(grad, name).reshape(shape))

        edge.node.register_prehook(on_gradient)


def _computed(output: Tensor) -> Tensor:
    """Return what a layer's output is a view of, if it is the same numbers in another shape, or the output itself.

    An in-place operation on a view takes the node that made the view out of autograd's graph, but not that of its base:
    ``nn.Linear`` returns such a view for inputs of more than two dimensions.
    """
    base = output._base
    return output if base is None or base.numel() != output.numel() or not base.requires_grad else base


def _as_dense(values: Any, layer_name: str) -> Tensor:
    """Return a layer's input or output gradient as a plain dense tensor.

    Sparse tensors are made dense; subclasses that only carry something along lose it.

    Args:
        values: What the layer, or autograd, has been given.
        layer_name: The layer, for the message.

    Raises:
        RuntimeError: If it is nested, or of a class with products of its own.
    """
    if type(values) is Tensor and values.layout == torch.strided and not values.is_nested:
        return values
    is_tensor = isinstance(values, Tensor) and type(values).__torch_dispatch__ is Tensor.__torch_dispatch__
    if not is_tensor or values.is_nested:
        kind = "a nested tensor" if is_tensor else f"a {type(values).__name__}"
        raise RuntimeError(
            f"Layer {layer_name!r} was called with {kind}, from which statistics are not measured: give it an ordinary "
            f"tensor (such as nested.to_padded_tensor(0.0)), or list the layer in skip."
        )
    if type(values) not in (Tensor, nn.Parameter):
        with torch._C.DisableTorchFunctionSubclass():
            values = values.detach().as_subclass(Tensor)
    result: Tensor = values.detach() if values.layout == torch.strided else values.detach().to_dense()
    return result
