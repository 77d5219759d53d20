"""One layer's passes, from the call of the layer until its weight gradient is part of ``.grad``.

A backward pass may bring an output gradient and leave ``.grad`` alone (``torch.autograd.grad``), or fail half way, and
what it has added to ``.grad`` may be thrown away before the step. So a call counts from where autograd accumulates the
weight gradient of its backward pass, and no longer than that gradient lasts.
"""

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node, get_gradient_edge
from torch.utils.hooks import RemovableHandle

from kfac_sua.preconditioner.backward import NO_TASK, current_task
from kfac_sua.preconditioner.forms.unfold import to_locations
from kfac_sua.preconditioner.gradient_check import GradientCheck
from kfac_sua.preconditioner.statistics import Call, LayerStatistics, ModelPass
from kfac_sua.preconditioner.used import is_used_up


class Listener(Protocol):
    """What all layers of a model have in common."""

    enabled: bool

    def end_pass(self) -> None:
        """Called when a backward pass has been counted."""


class LayerRecorder:
    """Feeds one layer's statistics.

    Args:
        module: The layer.
        statistics: What it feeds.
        listener: Knows whether anything is to be recorded.
        from_training_loss: Output gradients are those of the training loss; otherwise others are handed over, and the
            training loss only shows which calls count.

    Attributes:
        weight_shape: Shape of the layer's weight.
        adds_to_used: Whether the step's gradients were added to those of a step before, already preconditioned.
        is_excused: Whether a call was not recorded on purpose, so that its gradient cannot add up.
    """

    def __init__(
        self, module: nn.Module, statistics: LayerStatistics, listener: Listener, *, from_training_loss: bool
    ) -> None:
        self.module = module
        self.weight_shape = self.weight.shape
        self.statistics = statistics
        self._listener = listener
        self._from_training_loss = from_training_loss
        self._check = GradientCheck(statistics.geometry)
        self._nodes: list[Node] = []
        self._handles: list[RemovableHandle] = []
        self.clear()

    @property
    def weight(self) -> Tensor:
        """The layer's weight."""
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return weight

    def clear(self) -> None:
        """Forget everything recorded."""
        self.statistics.clear()
        self._check.clear()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._nodes.clear()
        self._tasks: dict[int, list[Call]] = {}
        self._task_of: dict[Call, int] = {}
        self._of_inputs: dict[Call, Tensor] = {}
        self._recomputed: list[Call] = []
        self._version = 0
        self.adds_to_used = False
        self.is_excused = False

    def add_call(self, inputs: Tensor, output_shape: torch.Size, model_pass: ModelPass) -> Call:
        """Record a call, whose inputs are measured at once.

        Inside a backward pass activation checkpointing runs the layer again. In its reentrant mode that call is the one
        whose gradient will come; in the other one it was recorded before, and the second call gets none. So there the
        inputs wait.
        """
        self._watch()
        is_recomputed = current_task() != NO_TASK
        call = self.statistics.add_call(inputs, output_shape, model_pass, waits=is_recomputed)
        if is_recomputed:
            self._recomputed.append(call)
        else:
            self._project(call, to_locations(inputs.detach(), self.statistics.geometry))
        return call

    def receive(self, call: Call, output_grads: Tensor) -> None:
        """Take in what a backward pass brings to a call's output, on its way to ``.grad``.

        Args:
            call: The call.
            output_grads: Gradient with respect to its output.
        """
        task = current_task()
        if call in self._recomputed:
            self._recomputed.remove(call)
        else:
            self._drop_recomputed()
        if call.inputs is not None:
            self._project(call, call.inputs)
        if task not in self._tasks:
            self._begin(task)
        before = self._task_of.get(call)
        if self._from_training_loss:
            if before not in (None, task) and not call.is_counted:
                call.forget_output_grads()  # that backward pass did not get to ``.grad``
            self.statistics.add_output_grads(output_grads, call)
        if before is not None and call in self._tasks[before]:
            self._tasks[before].remove(call)
        self._task_of[call] = task
        self._tasks[task].append(call)
        if call in self._of_inputs:
            self._check.expect(task, self._of_inputs[call], output_grads)

    def count_sampled(self) -> None:
        """Count calls by the output gradients handed over alone, where no training loss has shown which count."""
        if not self._from_training_loss and not self.statistics.num_counted:
            self.statistics.count([call for call in self.statistics.open_calls if call.samples])

    def forget_counted(self) -> None:
        """Forget what has been counted: its gradient was thrown away."""
        self.statistics.forget_counted()
        self._check.clear()
        self.adds_to_used = False

    @property
    def check(self) -> GradientCheck:
        """Whether the weight gradient is that of what was recorded; empty where that cannot be said.

        A hook on the weight may change its gradient on purpose.
        """
        if self.is_excused or self.weight._backward_hooks:
            self._check.clear()
        return self._check

    @torch.no_grad()
    def _project(self, call: Call, inputs: Tensor) -> None:
        self._of_inputs[call] = self._check.of_inputs(inputs)

    def _watch(self) -> None:
        """Be told where the weight's gradient is accumulated."""
        node = get_gradient_edge(self.weight).node
        if node not in self._nodes:
            self._nodes.append(node)
            self._handles += [node.register_prehook(self._before_adding), node.register_hook(self._added)]

    def _begin(self, task: int) -> None:
        """See what has become of the gradient of earlier backward passes, before another one adds to it."""
        self._tasks[task] = []
        grad = self.weight.grad
        if not self.statistics.num_counted:
            self.adds_to_used = grad is not None and is_used_up(grad)
        elif grad is None or (grad._version != self._version and not bool(grad.any())):
            self.forget_counted()

    @torch.no_grad()
    def _before_adding(self, grads: tuple[Tensor | None, ...]) -> None:
        task, (grad,) = current_task(), grads
        if self._listener.enabled and grad is not None and self._tasks.get(task):
            self._check.compare(task, grad)

    @torch.no_grad()
    def _added(self, *unused: object) -> None:
        del unused
        calls = self._tasks.pop(current_task(), [])
        if not self._listener.enabled or not calls:
            return
        landed = [call for call in calls if call.samples and not call.is_counted]
        for call in landed:
            self._of_inputs.pop(call, None)
        self.statistics.count(landed)
        grad = self.weight.grad
        self._version = 0 if grad is None else grad._version
        self._listener.end_pass()

    def _drop_recomputed(self) -> None:
        """Let go of recomputed calls that get no gradient: one recorded before has got it."""
        for call in self._recomputed:
            self.statistics.open_calls.remove(call)
            self._of_inputs.pop(call, None)
        self._recomputed.clear()
