"""Compiled models: mini-batches with statistics run uncompiled, all others as one graph without a break.

A graph cannot hold the hooks: what they record lives in Python. Were they called from within one, it would be broken at
every layer, and stay broken on the mini-batches without statistics. Nor would a model that has been called before see
hooks added since. So the ``forward`` of a compiled module asks first, in a frame of its own, whether anything is
recorded; graphs depend on the answer.
"""

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import nn

from kfac_sua.preconditioner.model.replaced_forward import ReplacedForward, own_forward
from kfac_sua.preconditioner.model.wrappers import inside_of_compiled

REASON = "kfac_sua records statistics of this mini-batch, which no graph can hold; compile without fullgraph=True"


never_traced = torch._disable_dynamo
"""Keeps a function out of graphs, without loading the compiler where nothing is compiled."""


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


class UncompiledWhileRecording(ReplacedForward):
    """Stands in for the ``forward`` of one compiled module.

    Args:
        module: The module.
        recorder: Knows whether statistics are being recorded.
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
