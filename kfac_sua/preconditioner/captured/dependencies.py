"""What a captured step depends on beside the numbers in its tensors: addresses, shapes, modes, hooks, switches.

A replay runs no Python, and so none of the checks that a call makes. Instead everything that these checks look at is
read before each replay, as plain numbers, and compared with its values at the capture.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from kfac_sua.preconditioner.captured.optimizers import StepOptimizers
from kfac_sua.preconditioner.captured.values import plain_attributes
from kfac_sua.preconditioner.kfac import KroneckerPreconditioner

Reading = dict[str, list[Any]]
"""Values by kind, in a fixed order within each kind."""


class Dependencies:
    """Reads what a captured step depends on.

    Args:
        model: The bare model.
        optimizers: The optimizers of its parameters.
        preconditioner: The preconditioner of its gradients, if there is one.
        device: Their device; only its switches are read.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: StepOptimizers,
        preconditioner: KroneckerPreconditioner | None,
        device: torch.device,
    ) -> None:
        self._model = model
        self._optimizers = optimizers
        self._preconditioner = preconditioner
        self._device = device

    def read(self) -> Reading:
        """Return the values of now."""
        modules = list(_modules(self._model))
        return {
            "module": [_module(module) for module in modules],
            "parameter": [
                (*_place(parameter), parameter.requires_grad, *_hooks(parameter))
                for module in modules
                for parameter in module._parameters.values()
                if parameter is not None
            ],
            "buffer": [
                _place(buffer) for module in modules for buffer in module._buffers.values() if buffer is not None
            ],
            "number of the optimizer": self._optimizers.numbers(),
            "optimizer's state of parameter": self._optimizers.state(),
            "inverse of layer": self._inverses(),
            "process-wide switch": _switches(self._device),
        }

    def tensors(self) -> list[Tensor]:
        """Return the tensors read by address now, which steps make once and then write in place."""
        layers = () if self._preconditioner is None else self._preconditioner.layers
        inverses = (tensor for layer in layers for tensor in layer.read_tensors)
        scale = None if self._preconditioner is None else self._preconditioner.kl_scale
        found = [*self._model.parameters(), *self._model.buffers(), *self._optimizers.tensors, *inverses]
        return found if scale is None else [*found, scale]

    def changed(self, before: Reading) -> str:
        """Return what has changed since a reading, in a few words; empty if nothing has."""
        now = self.read()
        for kind, values in now.items():
            if values != before[kind]:
                if len(values) != len(before[kind]):
                    return f"how many there are of this: {kind}"
                index = next(i for i, (one, other) in enumerate(zip(values, before[kind], strict=True)) if one != other)
                if kind == "number of the optimizer":
                    return f"{values[index][0]}"
                names = self._names(kind)
                return f"{kind} {names[index] if index < len(names) else index}".rstrip()
        return ""

    def _inverses(self) -> list[Any]:
        if self._preconditioner is None:
            return []
        places: list[Any] = [list(map(_place, layer.read_tensors)) for layer in self._preconditioner.layers]
        scale = self._preconditioner.kl_scale
        return [*places, None if scale is None else scale.data_ptr()]

    def _names(self, kind: str) -> list[str]:
        """Return the names of the values of a kind, in order; empty if they have none."""
        names = {module: name for name, module in self._model.named_modules()}
        named = [(names[module], module) for module in _modules(self._model)]
        if kind == "module":
            return [name for name, _ in named]
        if kind == "parameter":
            return [f"{name}.{key}" for name, module in named for key in _keys(module._parameters)]
        if kind == "buffer":
            return [f"{name}.{key}" for name, module in named for key in _keys(module._buffers)]
        if kind == "inverse of layer" and self._preconditioner is not None:
            return [layer.name for layer in self._preconditioner.layers]
        return list(_SWITCHES) if kind == "process-wide switch" else []


def parameters_device(model: nn.Module) -> torch.device:
    """Return the device of a model's first parameter."""
    return next(model.parameters()).device


def _modules(model: nn.Module) -> Iterator[nn.Module]:
    """Yield a model and all modules in it, once each, faster than ``model.modules()``, which builds their names."""
    stack, seen = [model], {id(model)}
    while stack:
        module = stack.pop()
        yield module
        for child in module._modules.values():
            if child is not None and id(child) not in seen:
                seen.add(id(child))
                stack.append(child)


def _module(module: nn.Module) -> tuple[Any, ...]:
    """Return what a call of a module depends on: the numbers of its hooks, which are never reused, and attributes."""
    return (
        id(module),
        *module._forward_hooks,
        *module._forward_pre_hooks,
        *module._backward_hooks,
        *module._backward_pre_hooks,
        id(module.__dict__.get("forward")),
        plain_attributes(module),
    )


def _place(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def _hooks(parameter: Tensor) -> list[int]:
    return [*(parameter._backward_hooks or ()), *(getattr(parameter, "_post_accumulate_grad_hooks", None) or ())]


def _keys(values: dict[str, Any]) -> Iterator[str]:
    return (key for key, value in values.items() if value is not None)


_SWITCHES = (
    "torch.is_grad_enabled",
    "autocast",
    "autocast's dtype",
    "torch.backends.cuda.matmul.fp32_precision",
    "torch.backends.cudnn.conv.fp32_precision",
    "torch.backends.mkldnn.matmul.fp32_precision",
    "torch.use_deterministic_algorithms",
    "torch.backends.cudnn.benchmark",
    "hooks of all modules",
)


def _switches(device: torch.device) -> list[Any]:
    everywhere = nn.modules.module
    return [
        torch.is_grad_enabled(),
        torch.is_autocast_enabled(device.type),
        torch.get_autocast_dtype(device.type),
        torch.backends.cuda.matmul.fp32_precision,
        torch.backends.cudnn.conv.fp32_precision,  # type: ignore[attr-defined]
        torch.backends.mkldnn.matmul.fp32_precision,  # type: ignore[attr-defined]
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cudnn.benchmark,
        [
            *everywhere._global_forward_hooks,
            *everywhere._global_forward_pre_hooks,
            *everywhere._global_backward_hooks,
            *everywhere._global_backward_pre_hooks,
        ],
    ]
