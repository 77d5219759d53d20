"""Marks gradients that have been preconditioned, by whichever preconditioner, so that none is preconditioned twice.

The mark lasts until autograd adds to the gradient, which a hook on its parameter sees, or until another tensor takes
the gradient's place. Changes in place, such as clipping, leave the mark; so does zeroing the gradient or writing a new
one into it.
"""

from torch import Tensor
from torch.utils.hooks import RemovableHandle

_MARK = "_kfac_sua_is_preconditioned"


class GradientWatch:
    """A hook on a parameter that follows its gradient; all preconditioners of the layer share it.

    Attributes:
        version: Version of the gradient when it was marked; ``None`` if autograd has added to it since.
        was_added_to: Whether autograd has added to the marked gradient, and nothing else had changed it before.
    """

    def __init__(self) -> None:
        self.version: int | None = None
        self.was_added_to = False
        self.num_users = 0
        self.handle: RemovableHandle | None = None

    @classmethod
    def on(cls, parameter: Tensor) -> "GradientWatch | None":
        """Return the watch on a parameter, if there is one."""
        hooks = parameter._post_accumulate_grad_hooks or {}
        return next((hook for hook in hooks.values() if isinstance(hook, cls)), None)

    @classmethod
    def join(cls, parameter: Tensor) -> "GradientWatch":
        """Return the watch on a parameter for one more user; it is made if there is none."""
        watch = cls.on(parameter)
        if watch is None:
            watch = cls()
            watch.handle = parameter.register_post_accumulate_grad_hook(watch)
        watch.num_users += 1
        return watch

    def leave(self) -> None:
        """Take the hook off with its last user."""
        self.num_users -= 1
        if not self.num_users and self.handle is not None:
            self.handle.remove()

    def __call__(self, parameter: Tensor) -> None:
        """Note that autograd has added to the gradient."""
        grad = parameter.grad
        if self.version is not None and grad is not None and hasattr(grad, _MARK):
            self.was_added_to = grad._version == self.version + 1  # zeroing it would have raised the version once more
        self.version = None

    def mark(self, parameter: Tensor) -> None:
        """Note that the gradient has been preconditioned."""
        assert parameter.grad is not None
        setattr(parameter.grad, _MARK, True)
        self.version, self.was_added_to = parameter.grad._version, False


def is_preconditioned(parameter: Tensor) -> bool:
    """Return whether a parameter's gradient has been preconditioned, and autograd has not added to it since."""
    watch = GradientWatch.on(parameter)
    return watch is not None and watch.version is not None and hasattr(parameter.grad, _MARK)


def is_unchanged(parameter: Tensor) -> bool:
    """Return whether a preconditioned gradient has not been changed in place either, such as zeroed."""
    watch = GradientWatch.on(parameter)
    return watch is not None and parameter.grad is not None and watch.version == parameter.grad._version


def old_grad(parameter: Tensor) -> Tensor | bool:
    """Return whether a parameter has a preconditioned gradient, to which autograd is about to add.

    A gradient that has been changed in place may have been zeroed: then the answer is a 0-d tensor on the device.
    """
    if not is_preconditioned(parameter):
        return False
    assert parameter.grad is not None
    return True if is_unchanged(parameter) else parameter.grad.any()
