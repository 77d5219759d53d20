"""One layer's passes, from the call of the layer until its weight gradient is part of ``.grad``.

A backward pass may bring an output gradient and leave ``.grad`` alone (``torch.autograd.grad``), or fail half way, and
what it has added to ``.grad`` may be thrown away before the step. So a call counts from where autograd accumulates the
weight gradient of its backward pass, and no longer than that gradient lasts.
"""

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.utils.hooks import RemovableHandle

from kfac_sua.preconditioner.forms.unfold import to_locations
from kfac_sua.preconditioner.model.autograd import NO_TASK, GradUse, accumulation, current_task, use_of_grad
from kfac_sua.preconditioner.model.gradient_check import GradientCheck
from kfac_sua.preconditioner.model.used_gradient import old_grad
from kfac_sua.preconditioner.statistics import Call, LayerStatistics, ModelPass


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
        old_grad: Whether the step's gradients were added to one that had been preconditioned; a 0-d tensor where only
            the device knows.
        is_excused: Whether the gradient of a pass that was left out on purpose is part of the layer's.
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
        self._watched: tuple[Tensor, Node] | None = None
        self._handles: list[RemovableHandle] = []
        self.clear()

    @property
    def weight(self) -> Tensor:
        """The layer's weight."""
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return weight

    def clear(self) -> None:
        """Forget what has been recorded for a step, but not the calls whose backward pass is still to come."""
        self.statistics.clear()
        self._check.clear()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._watched = None
        self._tasks: dict[int, list[Call]] = {}
        self._version = 0
        self.old_grad: Tensor | bool = False
        self.is_excused = False

    def add_call(self, inputs: Tensor, output_shape: torch.Size, model_pass: ModelPass) -> Call:
        """Record a call, whose inputs are measured at once.

        Inside a backward pass activation checkpointing runs the layer again. In its reentrant mode that call is the one
        whose gradient will come; in the other one it was recorded before, and the second call gets none. So there the
        inputs wait.

        Returns:
            The call, to be held on to as long as a gradient may come.
        """
        self._watch()
        waits = current_task() != NO_TASK
        call = self.statistics.add_call(inputs, output_shape, model_pass, waits=waits)
        if not waits:
            call.compared = self._check.of_inputs(to_locations(inputs.detach(), self.statistics.geometry))
        return call

    def receive(self, call: Call, output_grads: Tensor) -> None:
        """Take in what a backward pass brings to a call's output, on its way to ``.grad``.

        Args:
            call: The call.
            output_grads: Gradient with respect to its output.
        """
        if call.is_forgotten or call.counted_in not in (None, self.statistics.step):
            return  # of a step before, or given up
        self._watch()
        task = current_task()
        if task not in self._tasks:
            self._begin(task)
        if call.inputs is not None:
            call.compared = self._check.of_inputs(call.inputs)
        if self._from_training_loss:
            if call.task not in (None, task) and call.counted_in is None:
                call.forget_output_grads()  # that backward pass did not get to ``.grad``
            self.statistics.add_output_grads(output_grads, call)
        call.task = task
        self._tasks[task].append(call)
        if call.compared is not None:
            self._check.expect(task, call.compared, output_grads)

    def excuse(self) -> None:
        """Note that a pass that was left out has come by, on its way to ``.grad`` perhaps."""
        self.is_excused |= self.is_accumulated

    def count_sampled(self) -> None:
        """Count calls by the output gradients handed over alone, where no training loss has shown which count."""
        if not self._from_training_loss and not self.statistics.num_counted:
            self.statistics.count([call for call in self.statistics.open_calls if call.samples])

    def forget_counted(self) -> None:
        """Forget what has been counted: its gradient was thrown away."""
        self.statistics.forget_counted()
        self._check.forget()
        self.old_grad = False

    @property
    def check(self) -> GradientCheck:
        """Whether the weight gradient is that of what was recorded; empty where that cannot be said.

        A hook on the weight may change its gradient on purpose.
        """
        if self.is_excused or self.weight._backward_hooks:
            self._check.clear()
        return self._check

    @property
    def is_accumulated(self) -> bool:
        """Whether the backward pass that is running adds to the weight's gradient."""
        self._watch()
        assert self._watched is not None
        return use_of_grad(self._watched[1]) is GradUse.ACCUMULATED

    def _watch(self) -> None:
        """Be told where the weight's gradient is accumulated."""
        weight = self.weight
        if self._watched is not None and self._watched[0] is weight:
            return
        node = accumulation(weight)
        self._watched = weight, node
        self._handles += [node.register_prehook(self._before_adding), node.register_hook(self._added)]

    def _begin(self, task: int) -> None:
        """See what has become of the gradient of earlier backward passes, before another one adds to it."""
        self._tasks[task] = []
        grad = self.weight.grad
        if not self.statistics.num_counted and self._check.is_empty:
            self.old_grad = old_grad(self.weight)
        elif grad is None or (grad._version != self._version and not bool(grad.any())):
            self.forget_counted()

    @torch.no_grad()
    def _before_adding(self, grads: tuple[Tensor | None, ...]) -> None:
        task, (grad,) = current_task(), grads
        if not self._listener.enabled or grad is None:
            return
        if task not in self._tasks:
            self._begin(task)
        self._check.compare(task, grad)

    @torch.no_grad()
    def _added(self, *unused: object) -> None:
        del unused
        calls = self._tasks.pop(current_task(), [])
        if not self._listener.enabled:
            return
        grad = self.weight.grad
        self._version = 0 if grad is None else grad._version
        if not calls:
            return
        self.statistics.count([call for call in calls if call.samples])
        if self._from_training_loss:  # nothing is to be compared with them once more
            for call in calls:
                call.compared = None
        self._listener.end_pass()
