"""Questions to autograd while a backward pass runs. Autograd's private functions are called here only."""

from enum import Enum

import torch
from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge

NO_TASK = -1
"""What :func:`current_task` returns outside of any backward pass."""


class GradUse(Enum):
    """What becomes of a parameter's gradient."""

    ACCUMULATED = "accumulated"
    """It is added to ``.grad``."""
    RETURNED = "returned"
    """``torch.autograd.grad`` returns it."""
    NONE = "none"
    """It is not computed."""


def current_task() -> int:
    """Return the number of the backward pass that is running; :data:`NO_TASK` outside of any."""
    return torch._C._current_graph_task_id()


def num_nodes_made() -> int:
    """Return a number that grows with every node that is added to autograd's graph."""
    return torch.autograd._get_sequence_nr()


def node_at_work() -> int:
    """Return the number, in the count of :func:`num_nodes_made`, of the node that the backward pass is at."""
    return torch._C._current_autograd_node()._sequence_nr()


def accumulation(parameter: Tensor) -> Node:
    """Return the node of autograd's graph that adds to a parameter's gradient."""
    return get_gradient_edge(parameter).node


def use_of_grad(node: Node) -> GradUse:
    """Return what becomes of a parameter's gradient in the backward pass that is running.

    Args:
        node: What :func:`accumulation` returned for the parameter.
    """
    try:
        is_added = torch._C._will_engine_execute_node(node)
    except RuntimeError:  # so it answers for a leaf whose gradient is returned instead
        return GradUse.RETURNED
    return GradUse.ACCUMULATED if is_added else GradUse.NONE


def is_transformed() -> bool:
    """Whether a transformation of ``torch.func`` (``vmap``, ``grad``, …) is at work."""
    return torch._C._functorch.peek_interpreter_stack() is not None
