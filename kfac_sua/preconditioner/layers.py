"""Which modules can be preconditioned, and their geometry.

Discovery names every parameter-holding module once: preconditioned, or left to the plain gradient with a reason.
"""

import fnmatch
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch import nn
from torch.nn.parameter import UninitializedParameter

from kfac_sua.preconditioner.geometry import LayerGeometry
from kfac_sua.preconditioner.stand_in import ForwardStandIn
from kfac_sua.preconditioner.wrappers import bare_name

logger = logging.getLogger(__name__)

SKIPPED, NORMALISED, FROZEN = "listed in skip", "normalisation layer", "frozen"
EXPECTED_REASONS = {SKIPPED, NORMALISED, FROZEN}
"""Reasons that surprise nobody; the others are worth a warning."""

NORMALISATION = (
    nn.modules.batchnorm._NormBase,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.LocalResponseNorm,
)


@dataclass(frozen=True)
class DiscoveredLayer:
    """A module that holds trainable parameters of its own.

    Args:
        name: Dotted name in the model; ``""`` for the model itself.
        module: The module.
        geometry: Its geometry, or ``None`` where it is left to the plain gradient.
        reason: Why it is left to the plain gradient; empty where it is preconditioned.
    """

    name: str
    module: nn.Module
    geometry: LayerGeometry | None
    reason: str = ""


def discover_layers(model: nn.Module, skip: Sequence[str] = ()) -> list[DiscoveredLayer]:
    """Return every module with parameters of its own, in the model's order, each with its geometry or a reason.

    Args:
        model: Any module.
        skip: Layer names to leave out, with shell-style wildcards.

    Raises:
        ValueError: If an entry of ``skip`` matches no layer, or no layer can be preconditioned.
    """
    layers = classify_layers(model, skip)
    for pattern in skip:
        if not any(fnmatch.fnmatchcase(layer.name, pattern) for layer in layers):
            known = ", ".join(layer.name for layer in layers)
            raise ValueError(f"skip entry {pattern!r} matches no layer of the model; its layers are {known}.")
    if not any(layer.geometry for layer in layers):
        reasons = "; ".join(f"{layer.name}: {layer.reason}" for layer in layers) or "it has no parameters"
        raise ValueError(f"No layer of the model can be preconditioned ({reasons}).")
    return layers


def classify_layers(model: nn.Module, skip: Sequence[str]) -> list[DiscoveredLayer]:
    """Return what :func:`discover_layers` does, whatever there is."""
    candidates = list(_parameter_holders(model))
    shared = _shared_parameters(candidates)
    return [_classify(name, module, skip, shared) for name, module in candidates]


def log_plain_layers(layers: Sequence[DiscoveredLayer]) -> None:
    """Name the layers that are left to the plain gradient, once: as a warning where one would not expect it."""
    for reason, names in names_by_reason((layer.name, layer.reason) for layer in layers).items():
        level = logging.INFO if reason in EXPECTED_REASONS else logging.WARNING
        logger.log(level, "Left to the plain gradient (%s): %s.", reason, ", ".join(names))


def names_by_reason(layers: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """Group the names of (name, reason) pairs by reason, without the pairs whose reason is empty."""
    names: dict[str, list[str]] = {}
    for name, reason in layers:
        if reason:
            names.setdefault(reason, []).append(name or "(model)")
    return names


def _classify(name: str, module: nn.Module, skip: Sequence[str], shared: set[int]) -> DiscoveredLayer:
    reason = _reason_to_leave(name, module, skip, shared)
    if reason or not isinstance(module, nn.Linear | nn.Conv2d):
        return DiscoveredLayer(name, module, None, reason)
    return DiscoveredLayer(name, module, LayerGeometry.of(module))


def _reason_to_leave(name: str, module: nn.Module, skip: Sequence[str], shared: set[int]) -> str:
    if any(fnmatch.fnmatchcase(name, pattern) for pattern in skip):
        return SKIPPED
    if isinstance(module, NORMALISATION):
        return NORMALISED
    if not isinstance(module, nn.Linear | nn.Conv2d):
        return _not_supported(module)
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "nn.MultiheadAttention uses its weight without calling it"
    if overridden := _overridden(module):
        return f"{type(module).__name__} overrides {overridden}"
    return _reason_of_parameters(module, shared)


def _not_supported(module: nn.Module) -> str:
    kind = type(module).__name__
    if not any(True for _ in module.children()):
        return f"{kind} is not supported (nn.Linear and nn.Conv2d are)"
    names = ", ".join(name for name, parameter in module._parameters.items() if parameter is not None)
    return f"{names} of {kind} itself"


def _overridden(module: nn.Linear | nn.Conv2d) -> str:
    """Return which method makes a linear layer or convolution compute something else; empty if none does."""
    if type(module).forward not in (nn.Linear.forward, nn.Conv2d.forward) or not _has_own_forward(module):
        return "forward"
    if isinstance(module, nn.Conv2d) and type(module)._conv_forward is not nn.Conv2d._conv_forward:
        return "_conv_forward"
    return ""


def _has_own_forward(module: nn.Module) -> bool:
    """Whether a module runs its class's forward, perhaps through what another preconditioner has left there."""
    forward = module.__dict__.get("forward")
    is_bound = getattr(forward, "__func__", None) is type(module).forward  # in a copy of a preconditioned model
    return forward is None or is_bound or isinstance(forward, ForwardStandIn)


def _reason_of_parameters(module: nn.Linear | nn.Conv2d, shared: set[int]) -> str:
    for name in ("weight", "bias"):
        if name not in module._parameters:
            return f"its {name} is computed (parametrised), not a parameter"
    if isinstance(module.weight, UninitializedParameter):
        return "not initialised yet (lazy); run one forward pass before constructing the preconditioner"
    if nn.Parameter not in type(module.weight).__mro__:
        return f"its weight is a {type(module.weight).__name__}, not an ordinary tensor"
    if module.weight.is_complex():
        return "complex weights are not supported"
    if not module.weight.requires_grad:
        return FROZEN
    if any(id(parameter) in shared for parameter in _own_parameters(module)):
        return "it shares a parameter with another module"
    return ""


def _parameter_holders(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield names and modules with parameters of their own; those of a parametrisation belong to what it computes."""
    inside: set[int] = set()
    for name, module in model.named_modules():
        parametrizations = getattr(module, "parametrizations", None)
        if isinstance(parametrizations, nn.Module):
            inside.update(id(part) for part in parametrizations.modules())
        if id(module) not in inside and _own_parameters(module):
            yield bare_name(name), module


def _own_parameters(module: nn.Module) -> list[nn.Parameter]:
    own = [parameter for parameter in module._parameters.values() if parameter is not None]
    parametrizations = getattr(module, "parametrizations", None)
    if isinstance(parametrizations, nn.Module):
        own += list(parametrizations.parameters())
    return own


def _shared_parameters(candidates: Sequence[tuple[str, nn.Module]]) -> set[int]:
    counts: dict[int, int] = {}
    for _, module in candidates:
        for parameter in module._parameters.values():
            if parameter is not None:
                counts[id(parameter)] = counts.get(id(parameter), 0) + 1
    return {key for key, count in counts.items() if count > 1}


def preconditioned(layers: Sequence[DiscoveredLayer]) -> Iterator[tuple[str, nn.Module, LayerGeometry]]:
    """Yield name, module and geometry of the layers that are preconditioned."""
    for layer in layers:
        if layer.geometry is not None:
            yield layer.name, layer.module, layer.geometry
