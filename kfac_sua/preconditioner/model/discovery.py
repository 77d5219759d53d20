"""Which modules are preconditioned, and why the others are not.

Discovery lists every module that holds parameters once: with its geometry if it is preconditioned, or with the reason
why it keeps the plain gradient.
"""

import fnmatch
import functools
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from types import FunctionType
from typing import Any

from torch import nn
from torch.nn.parameter import UninitializedParameter

from kfac_sua.preconditioner.geometry import LayerGeometry
from kfac_sua.preconditioner.model.module_geometry import geometry_of, unfit_weight
from kfac_sua.preconditioner.model.replaced_forward import ReplacedForward
from kfac_sua.preconditioner.model.wrappers import bare_name

logger = logging.getLogger(__name__)

SKIPPED, NORMALISED, FROZEN = "listed in skip", "normalisation layer", "frozen"
EXPECTED_REASONS = {SKIPPED, NORMALISED, FROZEN}
"""Reasons that a user expects; all others are logged as warnings."""

NORMALISATION = (
    nn.modules.batchnorm._NormBase,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.LocalResponseNorm,
)

_MOVING_HOOKS = {"ModelHook", "AlignDevicesHook"}
"""Hooks of accelerate that only move tensors between devices."""

_MOST_NAMES = 256
"""Names of one module that are considered: the number of names multiplies with each level of shared modules."""


@dataclass(frozen=True)
class DiscoveredLayer:
    """A module that holds trainable parameters of its own.

    Args:
        name: Dotted name in the model; ``""`` for the model itself.
        module: The module.
        geometry: Its geometry; ``None`` if it is left to the plain gradient.
        reason: Why it is left to the plain gradient; empty if it is preconditioned.
        other_names: Its other names, if it is registered several times; filled in only if ``skip`` is given.
    """

    name: str
    module: nn.Module
    geometry: LayerGeometry | None
    reason: str = ""
    other_names: tuple[str, ...] = ()

    def matches(self, pattern: str) -> bool:
        """Whether one of its names matches a shell-style pattern."""
        return any(fnmatch.fnmatchcase(name, pattern) for name in (self.name, *self.other_names))


@dataclass(frozen=True)
class _Surroundings:
    """What the decision on a module depends on beside the module: shared parameters, and devices."""

    shared: set[int]
    is_offloading: bool
    is_on_several_devices: bool


def discover_layers(model: nn.Module, skip: Sequence[str] = ()) -> list[DiscoveredLayer]:
    """Return every module with parameters of its own, in the model's order, each with its geometry or a reason.

    Args:
        model: Any module.
        skip: Layer names to leave out, with shell-style wildcards. Any name of a module that has several will do.

    Raises:
        ValueError: If an entry of ``skip`` matches no layer, or no layer can be preconditioned.
    """
    layers = classify_layers(model, skip)
    for pattern in skip:
        if not any(layer.matches(pattern) for layer in layers):
            known = ", ".join(_with_other_names(layer) for layer in layers)
            raise ValueError(f"skip entry {pattern!r} matches no layer of the model; its layers are {known}.")
    if not any(layer.geometry for layer in layers):
        reasons = "; ".join(f"{layer.name or '(model)'}: {layer.reason}" for layer in layers) or "it has no parameters"
        raise ValueError(f"No layer of the model can be preconditioned ({reasons}).")
    return layers


def classify_layers(model: nn.Module, skip: Sequence[str]) -> list[DiscoveredLayer]:
    """Return what :func:`discover_layers` returns, without its errors."""
    candidates = list(_parameter_holders(model))
    surroundings = _surroundings(model, candidates)
    names = _names(model) if skip else {}
    return [_classify(name, module, names.get(id(module), ()), skip, surroundings) for name, module in candidates]


def log_plain_layers(layers: Sequence[DiscoveredLayer]) -> None:
    """Log the layers that are left to the plain gradient: as a warning unless the reason is an expected one."""
    for reason, names in names_by_reason((layer.name, layer.reason) for layer in layers).items():
        level = logging.INFO if reason in EXPECTED_REASONS else logging.WARNING
        logger.log(level, "Left to the plain gradient (%s): %s.", reason, ", ".join(names))


def names_by_reason(layers: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """Group the names of (name, reason) pairs by reason; pairs without a reason are left out."""
    names: dict[str, list[str]] = {}
    for name, reason in layers:
        if reason:
            names.setdefault(reason, []).append(name or "(model)")
    return names


def _classify(
    name: str, module: nn.Module, names: Sequence[str], skip: Sequence[str], surroundings: _Surroundings
) -> DiscoveredLayer:
    layer = DiscoveredLayer(name, module, None, other_names=tuple(other for other in names if other != name))
    reason = SKIPPED if any(map(layer.matches, skip)) else _reason_to_leave(module, surroundings)
    if reason or not isinstance(module, nn.Linear | nn.Conv2d):
        return replace(layer, reason=reason)
    return replace(layer, geometry=geometry_of(module))


def _with_other_names(layer: DiscoveredLayer) -> str:
    return f"{layer.name} (also {', '.join(layer.other_names)})" if layer.other_names else layer.name


def _reason_to_leave(module: nn.Module, surroundings: _Surroundings) -> str:
    if isinstance(module, NORMALISATION):
        return NORMALISED
    if not isinstance(module, nn.Linear | nn.Conv2d):
        return _not_supported(module)
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "nn.MultiheadAttention uses its weight without calling it"
    return _overridden(module) or _reason_of_parameters(module, surroundings) or _reason_of_hook(module, surroundings)


def hook_of(module: nn.Module) -> object | None:
    """Return the hook that accelerate runs around a module's forward, if there is one."""
    return module.__dict__.get("_hf_hook")


def foreign_forward(module: nn.Module) -> object | None:
    """Return what runs in place of the forward of a module's class, apart from our own replacement; or ``None``."""
    forward = module.__dict__.get("forward")
    while isinstance(forward, ReplacedForward):
        forward = forward.replaced
    return None if forward is None or _is_own(module, forward) else forward


def _is_own(module: nn.Module, forward: object) -> bool:
    """Whether a forward is that of the module's class, perhaps of a copied model, or our replacement of it."""
    if isinstance(forward, ReplacedForward):
        return forward.replaced is None or _is_own(module, forward.replaced)
    return getattr(forward, "__func__", None) is type(module).forward


def _origin(forward: Any) -> str:
    """Return the module and name of the code that replaces a forward; ``__name__`` may be that of what it wraps."""
    while isinstance(forward, functools.partial):
        forward = forward.func
    function = getattr(forward, "__func__", forward)
    if not isinstance(function, FunctionType):
        kind = type(function)
        return f"{kind.__module__}.{kind.__qualname__}"
    return f"{function.__globals__.get('__name__', '?')}.{function.__code__.co_qualname}"


def _not_supported(module: nn.Module) -> str:
    kind = type(module).__name__
    if not any(True for _ in module.children()):
        return f"{kind} is not supported (nn.Linear and nn.Conv2d are)"
    names = ", ".join(name for name, parameter in module._parameters.items() if parameter is not None)
    return f"{names} of {kind} itself"


def _overridden(module: nn.Linear | nn.Conv2d) -> str:
    """Return why a linear layer or convolution computes something else; empty if it does not."""
    kind = type(module)
    if kind.forward not in (nn.Linear.forward, nn.Conv2d.forward):
        return f"{kind.__name__} overrides forward"
    if isinstance(module, nn.Conv2d) and type(module)._conv_forward is not nn.Conv2d._conv_forward:
        return f"{kind.__name__} overrides _conv_forward"
    replaced = foreign_forward(module)
    if replaced is None or (hook_of(module) is not None and _is_own(module, module.__dict__.get("_old_forward"))):
        return ""
    return f"its forward has been replaced, by {_origin(replaced)}"


def _reason_of_hook(module: nn.Module, surroundings: _Surroundings) -> str:
    """Return why a hook of accelerate around the layer's forward stands in the way; empty if none does."""
    hook = hook_of(module)
    if hook is None:
        return ""
    strangers = [
        type(one).__name__ for one in getattr(hook, "hooks", (hook,)) if type(one).__name__ not in _MOVING_HOOKS
    ]
    if strangers:
        return f"accelerate's {', '.join(strangers)} changes what goes through it"
    if surroundings.is_on_several_devices:
        return "accelerate's AlignDevicesHook brings its inputs from another device"
    return ""


def _reason_of_parameters(module: nn.Linear | nn.Conv2d, surroundings: _Surroundings) -> str:
    for name in ("weight", "bias"):
        if name not in module._parameters:
            return f"its {name} is computed (parametrised), not a parameter"
    if isinstance(module.weight, UninitializedParameter):
        return "not initialised yet (lazy); run one forward pass before constructing the preconditioner"
    if nn.Parameter not in type(module.weight).__mro__:
        return f"its weight is a {type(module.weight).__name__}, not an ordinary tensor"
    if module.weight.is_complex():
        return "complex weights are not supported"
    if module.weight.is_meta and surroundings.is_offloading:
        return "its weight is offloaded (on device meta between two calls), and so is its gradient"
    if not module.weight.requires_grad:
        return FROZEN
    if module.weight.numel() == 0:
        return f"its weight is empty, {list(module.weight.shape)}"
    if unfit := unfit_weight(module):
        return unfit
    if any(id(parameter) in surroundings.shared for parameter in _own_parameters(module)):
        return "it shares a parameter with another module"
    return ""


def _parameter_holders(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield name and module of every module with parameters of its own, which include those of parametrisations."""
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


def _names(model: nn.Module) -> dict[int, tuple[str, ...]]:
    """Return the names of each module, by its ``id``: several if it is registered several times."""
    names: dict[int, list[str]] = {}
    stack: list[tuple[nn.Module, str, frozenset[int]]] = [(model, "", frozenset())]
    while stack:
        module, name, above = stack.pop()
        known = names.setdefault(id(module), [])
        if id(module) in above or len(known) == _MOST_NAMES:
            continue
        known.append(name)
        children = [(key, child) for key, child in module._modules.items() if child is not None]
        inside = above | {id(module)}
        stack += [(child, f"{name}.{key}" if name else key, inside) for key, child in reversed(children)]
    return {key: tuple(dict.fromkeys(map(bare_name, known))) for key, known in names.items()}


def _surroundings(model: nn.Module, candidates: Sequence[tuple[str, nn.Module]]) -> _Surroundings:
    weights = [parameter for _, module in candidates for parameter in _own_parameters(module)]
    counts = Counter(
        id(parameter) for _, module in candidates for parameter in module._parameters.values() if parameter is not None
    )
    return _Surroundings(
        {key for key, count in counts.items() if count > 1},
        is_offloading=any(hook_of(module) is not None for module in model.modules()),
        is_on_several_devices=len({weight.device for weight in weights if not weight.is_meta}) > 1,
    )


def preconditioned(layers: Sequence[DiscoveredLayer]) -> Iterator[tuple[str, nn.Module, LayerGeometry]]:
    """Yield name, module and geometry of the layers that are preconditioned."""
    for layer in layers:
        if layer.geometry is not None:
            yield layer.name, layer.module, layer.geometry
