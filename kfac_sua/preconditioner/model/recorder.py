"""One layer's calls, each from its forward pass until its weight gradient is part of ``.grad``.

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
        listener: Knows whether calls are recorded, and is told of backward passes that have been counted.
        from_training_loss: Whether output gradients are those of the training loss. Otherwise they are handed over, and
            the training loss only shows which calls count.

    Attributes:
        weight_shape: Shape of the layer's weight.
        old_grad: Whether the step's gradients were added to one that had been preconditioned; a 0-d tensor where only
            the device knows.
        has_paused_pass: Whether the layer's gradient may contain that of a pass that was left out on purpose.
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
        self._hooked: tuple[Tensor, Node] | None = None
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
        self._hooked = None
        self._tasks: dict[int, list[Call]] = {}
        self._version = 0
        self.old_grad: Tensor | bool = False
        self.has_paused_pass = False

    def add_call(self, inputs: Tensor, output_shape: torch.Size, model_pass: ModelPass) -> Call:
        """Record a call, and measure its inputs at once.

        Inside a backward pass the inputs wait, as activation checkpointing runs the layer again there. In its reentrant
        mode the gradient belongs to this second call; in its other mode it belongs to the first one, which was recorded
        in the forward pass.

        Returns:
            The call, to be held on to as long as a gradient may come.
        """
        self._hook_weight()
        waits = current_task() != NO_TASK
        call = self.statistics.add_call(inputs, output_shape, model_pass, waits=waits)
        if not waits:
            call.compared = self._check.read_inputs(to_locations(inputs.detach(), self.statistics.geometry))
        return call

    def receive(self, call: Call, output_grads: Tensor) -> None:
        """Take in what a backward pass brings to a call's output, on its way to ``.grad``.

        Args:
            call: The call.
            output_grads: Gradient with respect to its output.
        """
        if call.is_forgotten or call.counted_in not in (None, self.statistics.step):
            return  # of a step before, or given up
        self._hook_weight()
        task = current_task()
        if task not in self._tasks:
            self._begin_task(task)
        if call.inputs is not None:
            call.compared = self._check.read_inputs(call.inputs)
        if self._from_training_loss:
            if call.task not in (None, task) and call.counted_in is None:
                call.forget_output_grads()  # the earlier backward pass did not get to ``.grad``
            self.statistics.add_output_grads(output_grads, call)
        call.task = task
        self._tasks[task].append(call)
        if call.compared is not None:
            self._check.expect(task, call.compared, output_grads)

    def note_paused_pass(self) -> None:
        """Note that the gradient of a pass that was left out comes by: on its way to ``.grad``, perhaps."""
        self.has_paused_pass |= self.is_accumulated

    def count_sampled(self) -> None:
        """Count calls by the output gradients handed over alone, where no training loss has shown which count."""
        if not self._from_training_loss and not self.statistics.num_counted:
            self.statistics.count([call for call in self.statistics.open_calls if call.samples])

    def forget_counted(self) -> None:
        """Forget the calls counted so far, as their gradient was thrown away."""
        self.statistics.forget_counted()
        self._check.discard()
        self.old_grad = False

    @property
    def check(self) -> GradientCheck:
        """Whether the weight gradient is that of the recorded calls; empty where that cannot be told.

        A hook on the weight may change its gradient on purpose.
        """
        if self.has_paused_pass or self.weight._backward_hooks:
            self._check.clear()
        return self._check

    @property
    def is_accumulated(self) -> bool:
        """Whether the backward pass that is running adds to the weight's gradient."""
        self._hook_weight()
        assert self._hooked is not None
        return use_of_grad(self._hooked[1]) is GradUse.ACCUMULATED

    def _hook_weight(self) -> None:
        """Put hooks on the node that accumulates the weight's gradient, unless they are there."""
        weight = self.weight
        if self._hooked is not None and self._hooked[0] is weight:
            return
        node = accumulation(weight)
        self._hooked = weight, node
        self._handles += [
            node.register_prehook(self._before_accumulation),
            node.register_hook(self._after_accumulation),
        ]

    def _begin_task(self, task: int) -> None:
        """See what has become of the gradient of earlier backward passes, before another one adds to it."""
        self._tasks[task] = []
        grad = self.weight.grad
        if not self.statistics.num_counted and self._check.is_empty:
            self.old_grad = old_grad(self.weight)
        elif grad is None or (grad._version != self._version and not bool(grad.any())):
            self.forget_counted()

    @torch.no_grad()
    def _before_accumulation(self, grads: tuple[Tensor | None, ...]) -> None:
        task, (grad,) = current_task(), grads
        if not self._listener.enabled or grad is None:
            return
        if task not in self._tasks:
            self._begin_task(task)
        self._check.add_accumulated(task, grad)

    @torch.no_grad()
    def _after_accumulation(self, *unused: object) -> None:
        del unused
        calls = self._tasks.pop(current_task(), [])
        if not self._listener.enabled:
            return
        grad = self.weight.grad
        self._version = 0 if grad is None else grad._version
        if not calls:
            return
        self.statistics.count([call for call in calls if call.samples])
        if self._from_training_loss:  # the calls get no second gradient to be compared with them
            for call in calls:
                call.compared = None
        self._listener.end_pass()
