"""Changes of a model that its preconditioner cannot follow: each is an error with a cure.

Layers may be frozen later, and are then left alone. A layer that becomes trainable, or is replaced, added or
parametrised later is an error at the next step: every step reads the model's structure, and checks all layers if the
structure has changed.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from kfac_sua.preconditioner.geometry import LayerGeometry
from kfac_sua.preconditioner.model.discovery import FROZEN, DiscoveredLayer, classify_layers

CURE = "make the preconditioner anew after the change (remove_hooks() takes the old one off the model)"


class ModelWatch:
    """Checks at every step that the model still has the layers that are preconditioned.

    Modules may be replaced, and parameters by others of the same shape, if :func:`check_layers` finds nothing wrong.

    Args:
        model: The model.
        layers: What was discovered in it.
        skip: Names of layers left out.
    """

    def __init__(self, model: nn.Module, layers: Sequence[DiscoveredLayer], skip: Sequence[str]) -> None:
        self._model = model
        self._layers = layers
        self._skip = skip
        self._structure: list[Any] = []

    def check(self, *, thoroughly: bool) -> None:
        """Check the model.

        Args:
            thoroughly: Check every layer even if the structure is that of the last check, as strides and the like are
                not part of the structure.

        Raises:
            RuntimeError: If layers have changed, have become trainable, or are still on device meta.
        """
        check_trainable(self._layers)
        structure = _structure(self._model)
        if thoroughly or structure != self._structure:
            check_layers(self._model, self._layers, self._skip)
            check_numbers(self._layers)
        self._structure = structure


def check_trainable(layers: Sequence[DiscoveredLayer]) -> None:
    """Check that no layer or bias that was frozen at construction has become trainable.

    Args:
        layers: What was discovered at construction.

    Raises:
        RuntimeError: If one has, as it would silently get the plain gradient.
    """
    for layer in layers:
        if layer.reason == FROZEN and _is_trainable(layer.module, "weight"):
            raise RuntimeError(
                f"Layer {layer.name!r} was frozen when the preconditioner was made and is trainable now; {CURE}, or "
                f"list the layer in skip."
            )
        if layer.geometry is not None and not layer.geometry.has_bias and _is_trainable(layer.module, "bias"):
            raise RuntimeError(
                f"The bias of layer {layer.name!r} was frozen or missing when the preconditioner was made and is "
                f"trainable now; {CURE}."
            )


def check_layers(model: nn.Module, layers: Sequence[DiscoveredLayer], skip: Sequence[str]) -> None:
    """Check that the model has the layers that are preconditioned, unchanged, and no others.

    Args:
        model: The model.
        layers: What was discovered at construction.
        skip: Names of layers left out.

    Raises:
        RuntimeError: If it has not.
    """
    before = {layer.name: layer for layer in layers}
    now = {layer.name: layer for layer in classify_layers(model, skip)}
    names = {id(layer.module): name for name, layer in now.items()}
    for name, layer in before.items():
        if layer.geometry is not None and (change := _change(layer, now.get(name), names)):
            raise RuntimeError(f"Layer {name!r} {change} since the preconditioner was made; {CURE}.")
    for name, layer in now.items():
        if layer.geometry is not None and name not in before:
            raise RuntimeError(f"Layer {name!r} was added since the preconditioner was made; {CURE}.")


def check_numbers(layers: Sequence[DiscoveredLayer]) -> None:
    """Check that no preconditioned layer is on device meta, whose tensors have shapes but no numbers.

    Args:
        layers: What was discovered at construction.

    Raises:
        RuntimeError: If one is; only :meth:`KroneckerPreconditioner.describe` works there.
    """
    for layer in layers:
        if layer.geometry is not None and isinstance(weight := layer.module.weight, nn.Parameter) and weight.is_meta:
            raise RuntimeError(
                f"Layer {layer.name!r} is on device meta and has no numbers to train: give the model some, as by "
                f"to_empty(device=...) and load_state_dict(), before the first step, or list the layer in skip."
            )


def is_frozen(module: nn.Module) -> bool:
    """Whether a layer's weight is frozen."""
    return not _is_trainable(module, "weight")


def _change(before: DiscoveredLayer, now: DiscoveredLayer | None, names: Mapping[int, str]) -> str:
    if now is None or now.module is not before.module:
        new_name = names.get(id(before.module))
        moved = f", and is {new_name!r} now" if new_name is not None else ""
        return f"was {'removed' if now is None else 'replaced'}{moved}"
    if now.reason not in ("", FROZEN):
        return f"cannot be preconditioned any more ({now.reason})"
    if now.geometry is None or before.geometry is None:
        return ""
    if before.geometry.has_bias and now.module._parameters.get("bias") is None:
        return "has lost its bias"
    if dataclasses.replace(now.geometry, has_bias=before.geometry.has_bias) != before.geometry:
        return f"has got another shape or other options ({_differences(before.geometry, now.geometry)})"
    return ""


def _differences(before: LayerGeometry, now: LayerGeometry) -> str:
    values = [
        (field.name, getattr(before, field.name), getattr(now, field.name))
        for field in dataclasses.fields(before)
        if field.name != "has_bias"
    ]
    return ", ".join(f"{name}: {old} then, {new} now" for name, old, new in values if old != new)


def _structure(model: nn.Module) -> list[Any]:
    """Return what changes whenever the layers of a model may have changed: modules, forwards, parameters, shapes.

    Every step reads it, so it must be cheap. Objects are told apart by their addresses. An address can be used again,
    but not that of a discovered layer, which is kept alive; and a parameter may be replaced by any other of its shape.
    """
    found: list[Any] = []
    stack, seen = [model], {id(model)}
    while stack:
        module = stack.pop()
        found += (id(module), id(module.__dict__.get("forward")))
        for name, parameter in module._parameters.items():
            if parameter is not None:
                found += (name, id(parameter), parameter.shape, parameter.requires_grad)
        for child in module._modules.values():
            if child is not None and id(child) not in seen:
                seen.add(id(child))
                stack.append(child)
    return found


def _is_trainable(module: nn.Module, name: str) -> bool:
    parameter = module._parameters.get(name)
    return parameter is not None and parameter.requires_grad
