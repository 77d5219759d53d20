"""Which forward pass of the model a call of a layer belongs to.

A layer that is called several times within one forward pass shares its weight over the calls; several forward passes
before a step are more examples. Activation checkpointing calls layers again inside the backward pass: such a call
belongs to the forward pass whose checkpoint is run again, which autograd's numbering of its nodes tells.
"""

import bisect
import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kfac_sua.preconditioner.model.autograd import NO_TASK, current_task, node_at_work, num_nodes_made
from kfac_sua.preconditioner.statistics import ModelPass

MOST_PASSES = 1000
"""Forward passes that are remembered between two steps, for checkpoints that are still to be run again."""


class ForwardPasses:
    """The forward passes of a model since the last step, in the order of the nodes that they made."""

    def __init__(self) -> None:
        self._passes: list[ModelPass] = []
        self._num_passes = 0
        self._is_over = True

    def clear(self) -> None:
        """Forget all passes but the last, whose backward pass may still come."""
        del self._passes[:-1]
        self._is_over = True

    def begin(self, arguments: Any) -> None:
        """Note that the model is entered with these arguments.

        Args:
            arguments: Nested tuples, lists and mappings; the first tensor's first dimension counts the examples.
        """
        if current_task() == NO_TASK:  # inside a backward pass a checkpoint enters the model again
            # Without gradients it may be the first pass of a checkpoint, whose node was the last to be made.
            self._begin(num_nodes_made() - (not torch.is_grad_enabled()), _num_examples(arguments))

    def end(self) -> None:
        """Let the next call begin a new forward pass: a backward pass has been counted since the last one."""
        self._is_over = True

    def follow_checkpoints(self) -> None:
        """Note a call of a layer that may be inside a checkpoint, before :meth:`current` is asked about it."""
        if current_task() != NO_TASK:
            self._follow_rerun()
        elif self._is_over and not torch.is_grad_enabled():
            self._begin(num_nodes_made() - 1, None)  # perhaps inside a checkpoint, whose node was the last to be made

    def current(self) -> ModelPass:
        """Return the forward pass that a call belongs to which is made now.

        Inside a backward pass it is the one in which the node at work was made. Loops that call layers without the
        model begin a new pass after each backward pass.
        """
        if current_task() != NO_TASK and self._passes:
            made = node_at_work()
            return next((one for one in reversed(self._passes) if one.start <= made), self._passes[0])
        if self._is_over:
            self._begin(num_nodes_made(), None)
        return self._passes[-1]

    def _begin(self, start: int, num_examples: int | None) -> None:
        del self._passes[:-MOST_PASSES]
        self._passes.append(ModelPass(self._num_passes, num_examples, start))
        self._num_passes += 1
        self._is_over = False

    def _follow_rerun(self) -> None:
        """Let the nodes made from now on, in a checkpoint that is run again, belong to the checkpoint's forward pass.

        Checkpoints nested in it make nodes of their own; where gradients are off, the last one was made just now.
        """
        start = num_nodes_made() - (not torch.is_grad_enabled())
        again = dataclasses.replace(self.current(), start=start)
        if self._passes and self._passes[-1].index != again.index:
            bisect.insort(self._passes, again, key=lambda one: one.start)


def _num_examples(arguments: Any) -> int | None:
    """Return the first dimension of the first tensor in nested arguments; ``None`` if there is none."""
    if isinstance(arguments, Tensor):
        return None if arguments.is_nested or not arguments.dim() else arguments.shape[0]
    if isinstance(arguments, Mapping):
        arguments = list(arguments.values())
    if not isinstance(arguments, list | tuple):
        return None
    return next((count for one in arguments if (count := _num_examples(one)) is not None), None)
