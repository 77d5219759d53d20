"""Compiled models: mini-batches with statistics run uncompiled, all others as one graph without a break.

A graph cannot hold the hooks: what they record lives in Python. Were they called from within one, it would be broken at
every layer, and stay broken on the mini-batches without statistics. Nor would a model that has been called before see
hooks added since. So the ``forward`` of a compiled module asks first, in a frame of its own, whether anything is
recorded; graphs depend on the answer.
"""

from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any, Protocol

import torch
from torch import nn

from kfac_sua.preconditioner.wrappers import inside_of_compiled

REASON = "kfac_sua records statistics of this mini-batch, which no graph can hold; compile without fullgraph=True"


class Recorder(Protocol):
    """What knows whether statistics are being recorded."""

    enabled: bool


def compiled_modules(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules that ``torch.compile`` has been told to compile: the model, or parts of it."""
    for module in model.modules():
        if (inside := inside_of_compiled(module)) is not None:
            yield inside
        elif getattr(module, "_compiled_call_impl", None) is not None:
            yield module


class UncompiledWhileRecording:
    """Stands in for the ``forward`` of one compiled module.

    Args:
        module: The module.
        recorder: Knows whether statistics are being recorded.
    """

    is_stand_in = True

    def __init__(self, module: nn.Module, recorder: Recorder) -> None:
        self._module = module
        self._recorder = recorder
        self._replaced: Callable[..., Any] | None = module.__dict__.get("forward")
        self._forward = self._replaced or MethodType(type(module).forward, module)
        self._uncompiled = torch.compiler.disable(self._forward, reason=REASON)
        module.forward = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's own forward."""
        if self._recorder.enabled:
            return self._uncompiled(*args, **kwargs)
        return self._forward(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Return the copied module's own forward: a copy of the model has no preconditioner."""
        return _own_forward(memo[id(self._module)])

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as the module's own forward, for the same reason."""
        return _own_forward, (self._module,)

    def remove(self) -> None:
        """Give the module its ``forward`` back."""
        if self._module.__dict__.get("forward") is not self:
            return
        del self._module.forward
        if self._replaced is not None:
            self._module.forward = self._replaced


def _own_forward(module: nn.Module) -> Any:
    return MethodType(type(module).forward, module)
