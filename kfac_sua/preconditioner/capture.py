"""Hooks that record layer inputs and output gradients, only while statistics are due.

One forward hook per layer; output gradients come through ``output.register_hook`` (empirical Fisher) or through the
gradient edge of the output (sampled and exact Fisher). Both refer to the output as the layer returned it, also when it
is modified in place afterwards (``relu_``, ``out += shortcut``), where full backward hooks raise.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from kfac_sua.preconditioner.precision import factor_precision
from kfac_sua.preconditioner.statistics import Call, LayerStatistics

Phase = Callable[[str], AbstractContextManager[Any]]


@dataclass
class PhaseSource:
    """Gives the context that the time of a named piece of work is accounted to; shared, so that it can be replaced."""

    phase: Phase


@dataclass
class _RecordedOutput:
    statistics: LayerStatistics
    edge: GradientEdge
    call: Call


class Capture:
    """Feeds the inputs and output gradients of hooked layers to their statistics.

    Args:
        model: The model whose forward call delimits one pass.
        modules: Layer name to module.
        statistics: Layer name to the statistics it feeds.
        phases: Where the time of the statistics is accounted.
        from_training_loss: Take output gradients from whatever backward pass comes (empirical Fisher); otherwise only
            from :meth:`backward`.
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
        self.was_compiled = False
        self._phases = phases
        self._from_training_loss = from_training_loss
        self._statistics = statistics
        self._outputs: list[_RecordedOutput] = []
        self._model_pass = 0
        self._is_entered = False
        self._handles = [model.register_forward_pre_hook(_PassHook(self))]
        for name, module in modules.items():
            hook = _LayerHook(self, module, statistics[name])
            # Before hooks that are there already: they may return another output than the layer's own.
            self._handles.append(module.register_forward_hook(hook, prepend=True, with_kwargs=True))

    def clear(self) -> None:
        """Forget recorded statistics and outputs."""
        self._outputs.clear()
        for statistics in self._statistics.values():
            statistics.clear()

    def remove(self) -> None:
        """Remove every hook from the model, and forget what they recorded."""
        self.enabled = False
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.clear()

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
        for sample, cotangent in enumerate(cotangents):
            grads: Sequence[Tensor | None] = torch.autograd.grad(
                outputs, edges, cotangent, retain_graph=True, allow_unused=True
            )
            for output, grad in zip(recorded, grads, strict=True):
                if grad is not None:
                    self._record_gradient(output.statistics, output.call, grad, sample)

    def begin_pass(self) -> None:
        """Note that the model is entered anew."""
        self._is_entered = True

    def record(self, statistics: LayerStatistics, weight: Any, inputs: Tensor, output: Any) -> None:
        """Record one call of a layer, if it is of a kind whose gradient reaches the layer's ``.grad``.

        Calls without gradients are not, nor those with a frozen weight or one that ``torch.func.functional_call``
        lends, nor those inside transformations of ``torch.func``.
        """
        if not (self.enabled and torch.is_grad_enabled() and isinstance(output, Tensor) and output.requires_grad):
            return
        if not isinstance(weight, nn.Parameter) or not weight.requires_grad or is_transformed():
            return
        if statistics.is_awaiting and torch._C._current_graph_task_id() != -1:
            return  # activation checkpointing runs the forward pass again during backward; it was recorded before
        if self._is_entered:
            self._model_pass, self._is_entered = self._model_pass + 1, False
        with self._phases.phase("statistics"), factor_precision():
            call = statistics.add_inputs(inputs, output.shape, self._model_pass)
        if not self._from_training_loss:
            self._outputs.append(_RecordedOutput(statistics, get_gradient_edge(output), call))
            return

        def on_gradient(grad: Tensor) -> None:
            if self.enabled:
                self._record_gradient(statistics, call, grad)

        output.register_hook(on_gradient)

    def _record_gradient(self, statistics: LayerStatistics, call: Call, grad: Tensor, sample: int = 0) -> None:
        with self._phases.phase("statistics"), factor_precision():
            statistics.add_output_grads(grad, call, sample)


def num_captures_on(model: nn.Module) -> int:
    """Return how many captures record passes of a model or of modules in it: one for each preconditioner."""
    return sum(isinstance(hook, _PassHook) for module in model.modules() for hook in module._forward_pre_hooks.values())


def is_transformed() -> bool:
    """Whether a transformation of ``torch.func`` (``vmap``, ``grad``, …) is at work."""
    return torch._C._functorch.peek_interpreter_stack() is not None


class _InertCopy:
    """A hook belongs to one module of one model: copies and pickles of the module get one that does nothing."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return _do_nothing

    def __reduce__(self) -> tuple[Callable[[], Callable[..., None]], tuple[()]]:
        return _make_inert, ()


# torch.compile may trace these hooks (see `compiled`): so they store nothing but constants, and read `enabled` first.
class _PassHook(_InertCopy):
    def __init__(self, capture: Capture) -> None:
        self._capture = capture

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        del module, args
        if self._capture.enabled:
            self._capture.begin_pass()


class _LayerHook(_InertCopy):
    def __init__(self, capture: Capture, module: nn.Module, statistics: LayerStatistics) -> None:
        self._capture = capture
        self._module = module
        self._statistics = statistics

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if getattr(module, "_is_replica", False):
            raise RuntimeError(
                f"Layer {self._statistics.name!r} runs in a copy that nn.DataParallel made, which cannot be recorded; "
                f"use DistributedDataParallel, with one process per device."
            )
        if self._capture.enabled and module is self._module:
            inputs = args[0] if args else kwargs["input"]
            record = self._capture.record
            if torch.compiler.is_compiling():
                self._capture.was_compiled = True
                record = torch.compiler.disable(record)
            record(self._statistics, module._parameters.get("weight"), inputs, output)


def _do_nothing(*args: object) -> None:
    del args


def _make_inert() -> Callable[..., None]:
    return _do_nothing
