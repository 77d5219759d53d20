"""Changes of the model that a preconditioner made before them cannot follow: each ends with a sentence, not in silence.

Layers frozen later are left alone; whatever becomes trainable, is replaced, added or parametrised later is an error.
"""

from collections.abc import Sequence

from torch import nn

from kfac_sua.preconditioner.layers import FROZEN, DiscoveredLayer, classify_layers

CURE = "make the preconditioner anew after the change (remove_hooks() takes the old one off the model)"


def check_trainable(layers: Sequence[DiscoveredLayer]) -> None:
    """Check that no layer or bias that was frozen at construction has become trainable.

    Args:
        layers: What was discovered at construction.

    Raises:
        RuntimeError: If one has: it would silently get the plain gradient.
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
    """Check that the model still has the layers that are preconditioned, as they were, and no others.

    Args:
        model: The model.
        layers: What was discovered at construction.
        skip: Names of layers left out.

    Raises:
        RuntimeError: If it has not.
    """
    before = {layer.name: layer for layer in layers}
    now = {layer.name: layer for layer in classify_layers(model, skip)}
    for name, layer in before.items():
        if layer.geometry is not None and (change := _change(layer, now.get(name))):
            raise RuntimeError(f"Layer {name!r} {change} since the preconditioner was made; {CURE}.")
    for name, layer in now.items():
        if layer.geometry is not None and name not in before:
            raise RuntimeError(f"Layer {name!r} was added since the preconditioner was made; {CURE}.")


def is_frozen(module: nn.Module) -> bool:
    """Whether a layer's weight is frozen."""
    return not _is_trainable(module, "weight")


def _change(before: DiscoveredLayer, now: DiscoveredLayer | None) -> str:
    if now is None:
        return "was removed"
    if now.module is not before.module:
        return "was replaced"
    if now.reason not in ("", FROZEN):
        return f"cannot be preconditioned any more ({now.reason})"
    return ""


def _is_trainable(module: nn.Module, name: str) -> bool:
    parameter = module._parameters.get(name)
    return parameter is not None and parameter.requires_grad
