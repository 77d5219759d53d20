"""A callable in the place of a module's ``forward`` that does not follow the module into copies and pickles."""

from types import MethodType
from typing import Any

from torch import nn


class ReplacedForward:
    """Replaces the ``forward`` of one module by ``__call__`` of a subclass.

    Args:
        module: The module.
        replaced: What :meth:`remove` puts back; ``None`` for the forward of the module's class.
    """

    def __init__(self, module: nn.Module, replaced: Any = None) -> None:
        self._module = module
        self._replaced = replaced
        module.forward = self  # type: ignore[assignment]  # subclasses are callable

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Return the copied module's own forward: a copy of the model has no preconditioner."""
        return own_forward(memo[id(self._module)])

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as the module's own forward, for the same reason, and loadable without this package.

        When it is loaded, the module has nothing but its class yet.
        """
        return getattr, (self._module, "forward")

    @property
    def replaced(self) -> Any:
        """What :meth:`remove` puts back; ``None`` for the forward of the module's class."""
        return self._replaced

    def remove(self) -> None:
        """Give the module its ``forward`` back, unless something else has taken this one's place."""
        if self._module.__dict__.get("forward") is not self:
            return
        del self._module.forward
        if self._replaced is not None:
            self._module.forward = self._replaced


def own_forward(module: nn.Module) -> Any:
    """Return the forward of a module's class, bound to the module."""
    return MethodType(type(module).forward, module)
