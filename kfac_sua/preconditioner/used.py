"""Gradients that have been preconditioned: a mark on them, so that none is preconditioned twice.

The mark is the tensor's version, which every change in place raises: whatever is added to a gradient, or zeroes it,
takes the mark off.
"""

from torch import Tensor

_MARK = "_kfac_sua_preconditioned_version"


def mark_used_up(grad: Tensor) -> None:
    """Mark a gradient as preconditioned."""
    setattr(grad, _MARK, grad._version)


def is_used_up(grad: Tensor) -> bool:
    """Whether a gradient was preconditioned and has not changed since."""
    return getattr(grad, _MARK, None) == grad._version
