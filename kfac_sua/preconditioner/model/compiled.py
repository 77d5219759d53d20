"""Compiled models: mini-batches with statistics run uncompiled, all others as one graph without a break.

A graph cannot contain the hooks, which record into Python objects. If a graph called them, it would be broken at every
layer, also on mini-batches without statistics. And a model that was called before it was hooked would not see the
hooks. So the ``forward`` of a compiled module asks first, in a frame of its own, whether anything is recorded, and
graphs depend on the answer.
"""

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import nn

from kfac_sua.preconditioner.model.replaced_forward import ReplacedForward, own_forward
from kfac_sua.preconditioner.model.wrappers import inside_of_compiled

REASON = "kfac_sua records statistics of this mini-batch, which no graph can hold; compile without fullgraph=True"


never_traced = torch._disable_dynamo
"""Decorator that keeps a function out of graphs. It does not load the compiler if nothing is compiled."""


class Recorder(Protocol):
    """Knows whether statistics are recorded."""

    enabled: bool


def compiled_modules(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules that ``torch.compile`` compiles: the model, or parts of it."""
    for module in model.modules():
        if (inside := inside_of_compiled(module)) is not None:
            yield inside
        elif getattr(module, "_compiled_call_impl", None) is not None:
            yield module


class UncompiledWhileRecording(ReplacedForward):
    """Replaces the ``forward`` of one compiled module.

    Args:
        module: The module.
        recorder: Knows whether statistics are recorded.
    """

    def __init__(self, module: nn.Module, recorder: Recorder) -> None:
        replaced: Callable[..., Any] | None = module.__dict__.get("forward")
        self._recorder = recorder
        self._forward = replaced or own_forward(module)
        self._uncompiled = torch.compiler.disable(self._forward, reason=REASON)
        super().__init__(module, replaced)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's own forward."""
        if self._recorder.enabled:
            return self._uncompiled(*args, **kwargs)
        return self._forward(*args, **kwargs)
