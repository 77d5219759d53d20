"""Gradients that have been preconditioned, by whichever preconditioner: none is to be preconditioned twice.

A parameter's gradient is used up from then on until autograd adds to it, which a hook on the parameter sees, or another
tensor takes its place. Changes in place, such as clipping, leave it used up; it may also have been zeroed by one.
"""

import weakref
from collections.abc import MutableMapping

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_used: MutableMapping[Tensor, tuple[weakref.ReferenceType[Tensor], int]] = WeakTensorKeyDictionary()
"""Of a parameter, the gradient that has been preconditioned and its version then, which changes in place raise."""


def mark_used_up(parameter: Tensor) -> None:
    """Note that a parameter's gradient has been preconditioned."""
    if parameter.grad is not None:
        _used[parameter] = weakref.ref(parameter.grad), parameter.grad._version


def mark_fresh(parameter: Tensor) -> None:
    """Note that something has been added to a parameter's gradient: a hook for after the accumulation."""
    _used.pop(parameter, None)


def is_used_up(parameter: Tensor) -> bool:
    """Whether a parameter's gradient has been preconditioned and nothing has been added to it since."""
    grad, used = parameter.grad, _used.get(parameter)
    return grad is not None and used is not None and used[0]() is grad


def is_unchanged(parameter: Tensor) -> bool:
    """Whether a gradient that is used up has not been changed in place either, such as zeroed."""
    return parameter.grad is not None and _used[parameter][1] == parameter.grad._version


def old_grad(parameter: Tensor) -> Tensor | bool:
    """Return whether a parameter has a gradient that is used up, and that others are about to be added to.

    Where it has been changed in place, it may have been zeroed: then the answer is a 0-d tensor on the device.
    """
    if not is_used_up(parameter):
        return False
    assert parameter.grad is not None
    return True if is_unchanged(parameter) else parameter.grad.any()
