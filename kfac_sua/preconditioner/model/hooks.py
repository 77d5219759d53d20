"""The hooks that a preconditioner puts on a model: they hand on what they see, and do not follow it into copies.

``torch.compile`` may trace them (see ``compiled``): so they store nothing but constants, and read ``enabled`` first.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Protocol

import torch
from torch import nn

from kfac_sua.preconditioner.model.recorder import LayerRecorder


class CallSink(Protocol):
    """What the hooks hand calls to."""

    enabled: bool
    is_paused: bool
    was_compiled: bool

    def begin_pass(self, arguments: Any) -> None:
        """Called when the model is entered."""

    def end_pass(self) -> None:
        """Called instead while a compiler traces the model."""

    def record(self, recorder: LayerRecorder, weight: Any, inputs: Any, output: Any) -> None:
        """Called after each call of a layer."""


class _ModelHook:
    """A hook that belongs to one model.

    Copies and pickles of the model get a hook of the standard library that does nothing, so that they can be loaded
    where this package is not installed.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return _InertHook()

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (nullcontext(), "__exit__")

    @property
    def __name__(self) -> str:
        """What only ``torch.jit.script`` asks for, which would compile the hook."""
        raise AttributeError(
            "torch.jit.script cannot compile the hooks of a preconditioner: call preconditioner.remove_hooks() first, "
            "before the model is copied, or script a new model that was given load_state_dict(model.state_dict()); "
            "torch.jit.trace, torch.export and torch.fx take the model as it is"
        )


class _InertHook(_ModelHook):
    """What a copied model has in the place of a hook."""

    def __call__(self, *args: Any) -> None:
        del args


class PassHook(_ModelHook):
    """Forward pre-hook of the model: says when it is entered."""

    def __init__(self, sink: CallSink) -> None:
        self._sink = sink

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Run before the model's forward pass."""
        del module
        if self._sink.enabled:
            if torch.compiler.is_compiling():
                self._sink.end_pass()
            else:
                self._sink.begin_pass((args, kwargs))


class LayerHook(_ModelHook):
    """Forward hook of a layer: hands on its weight, inputs and output."""

    def __init__(self, sink: CallSink, recorder: LayerRecorder) -> None:
        self._sink = sink
        self._recorder = recorder

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Run after the layer's forward pass."""
        if getattr(module, "_is_replica", False):
            raise RuntimeError(
                f"Layer {self._recorder.statistics.name!r} runs in a copy that nn.DataParallel made, which cannot be "
                f"recorded; use DistributedDataParallel, with one process per device."
            )
        sink = self._sink
        if (sink.enabled or sink.is_paused) and module is self._recorder.module:
            inputs = args[0] if args else kwargs["input"]
            if torch.compiler.is_compiling():
                sink.was_compiled = True
            sink.record(self._recorder, module._parameters.get("weight"), inputs, output)


def num_captures_on(model: nn.Module) -> int:
    """Return how many captures record passes of a model or of modules in it: one for each preconditioner."""
    return sum(isinstance(hook, PassHook) for module in model.modules() for hook in module._forward_pre_hooks.values())
