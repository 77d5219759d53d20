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

from kfac_sua.preconditioner.statistics import LayerStatistics

Phase = Callable[[str], AbstractContextManager[Any]]


@dataclass
class PhaseSource:
    """Gives the context that the time of a named piece of work is accounted to; shared, so that it can be replaced."""

    phase: Phase


@dataclass
class _RecordedOutput:
    statistics: LayerStatistics
    edge: GradientEdge
    pass_index: int


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
        self._phases = phases
        self._from_training_loss = from_training_loss
        self._statistics = statistics
        self._outputs: list[_RecordedOutput] = []
        self._model_pass = 0
        self._handles = [model.register_forward_pre_hook(self._begin_pass)]
        for name, module in modules.items():
            hook = self._forward_hook(statistics[name])
            self._handles.append(module.register_forward_hook(hook, with_kwargs=True))

    def clear(self) -> None:
        """Forget recorded statistics and outputs."""
        self._outputs.clear()
        for statistics in self._statistics.values():
            statistics.clear()

    def remove(self) -> None:
        """Remove every hook from the model."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def backward(self, outputs: Tensor, cotangents: Iterator[Tensor]) -> None:
        """Send cotangents backward from ``outputs`` to the recorded layers, without touching any ``.grad``.

        The graph is retained, so the training loss can be differentiated from the same forward pass. No weight
        gradient is computed on the way.
        """
        recorded, self._outputs = self._outputs, []
        edges = [output.edge for output in recorded]
        for sample, cotangent in enumerate(cotangents):
            grads: Sequence[Tensor | None] = torch.autograd.grad(
                outputs, edges, cotangent, retain_graph=True, allow_unused=True
            )
            with self._phases.phase("statistics"):
                for output, grad in zip(recorded, grads, strict=True):
                    if grad is not None:
                        output.statistics.add_output_grads(grad, output.pass_index, sample)

    def _begin_pass(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        del module, args
        self._model_pass += 1

    def _forward_hook(self, statistics: LayerStatistics) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            del module
            if self.enabled and torch.is_grad_enabled() and output.requires_grad:
                self._record(statistics, args[0] if args else kwargs["input"], output)

        return hook

    def _record(self, statistics: LayerStatistics, inputs: Tensor, output: Tensor) -> None:
        with self._phases.phase("statistics"), torch.autocast(output.device.type, enabled=False):
            pass_index = statistics.add_inputs(inputs, output.shape, self._model_pass)
        if not self._from_training_loss:
            self._outputs.append(_RecordedOutput(statistics, get_gradient_edge(output), pass_index))
            return

        def on_gradient(grad: Tensor) -> None:
            with self._phases.phase("statistics"):
                statistics.add_output_grads(grad, pass_index)

        output.register_hook(on_gradient)
