"""Warns at construction of layers whose dense factors are large for their device.

If low-rank inverses are allowed, the memory of a layer depends on its mini-batches; so the warning is only for settings
that make factors dense for certain.
"""

import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import torch

from kfac_sua.preconditioner.forms.rates import rates_of
from kfac_sua.preconditioner.layer import PreconditionedLayer
from kfac_sua.preconditioner.registry import structure_class
from kfac_sua.preconditioner.settings import DampingRule, InverseMethod, KroneckerSettings

logger = logging.getLogger(__name__)

LARGE_SHARE = 0.1
"""Share of the device's memory that makes a layer large. A refresh holds new factors, inverses and workspace beside
what is kept, so that a few such layers fill it; the widest layer of the paper's networks keeps 0.16 GiB.
"""

LARGE_TOTAL_SHARE = 0.5
"""Share that makes all layers of a device together large: a refresh makes new inverses beside those at hand."""

LARGE_INVERSION_S = 100.0
"""Seconds of inversions in a refresh that make a layer large; the widest layer of the paper takes a core 3 seconds."""


def large_layers(layers: Iterable[tuple[PreconditionedLayer, int, int]], settings: KroneckerSettings) -> str:
    """Return which layers take much memory of their device or long to invert, with the cure; empty if none does.

    Args:
        layers: Each with the bytes that it keeps and the FLOPs of its inversions in a refresh, if dense.
        settings: Settings of the preconditioner.
    """
    cause, layers = _dense_because(settings), list(layers)
    found = [told for layer, kept, flops in layers if cause and (told := _size(layer, kept, flops))]
    if cause and not found:
        found = [*_totals(layers)]
    if not found:
        return ""
    if not structure_class(settings.structure).has_sides:
        return f"{'; '.join(found)}. {cause} keeps them dense: list such layers in skip, or use structure=kfac or sua."
    return (
        f"{'; '.join(found)}. {cause} makes factors dense: list such layers in skip, set group_size, or let "
        f"mini-batches of few rows make it cheaper (ema_decay=0, damping_rule=factored, inverse_method=auto)."
    )


def warn_of_large_layers(told: str) -> None:
    """Log the result of :func:`large_layers` as a warning, unless it is empty."""
    if told:
        logger.warning("Large: %s", told)


def device_memory(device: torch.device) -> int | None:
    """Return the bytes of a device's memory; ``None`` if they are not known."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    if device.type != "cpu":
        return None
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # not on every system
        return None


def _dense_because(settings: KroneckerSettings) -> str:
    """Return the setting that makes all factors dense; empty if none does."""
    if not structure_class(settings.structure).has_sides:
        return f"structure={settings.structure}"
    if settings.ema_decay > 0:
        return f"ema_decay={settings.ema_decay:g}"
    if settings.damping_rule is DampingRule.exact:
        return "damping_rule=exact"
    return "inverse_method=cholesky" if settings.inverse_method is InverseMethod.cholesky else ""


def _totals(layers: Sequence[tuple[PreconditionedLayer, int, int]]) -> Iterator[str]:
    """Yield a clause for each device on which all layers together take much memory."""
    totals: Counter[torch.device] = Counter()
    for layer, kept, _ in layers:
        totals[layer.weight.device] += kept
    for device, kept in totals.items():
        memory = device_memory(device)
        if memory is not None and kept > LARGE_TOTAL_SHARE * memory:
            yield (
                f"all layers together keep {kept / 2**30:.1f} GiB of the {memory / 2**30:.1f} GiB of device {device}"
            )


def _size(layer: PreconditionedLayer, kept: int, flops: int) -> str:
    device = layer.weight.device
    memory = device_memory(device)
    seconds = flops / rates_of(device).inverse
    is_much = memory is not None and kept > LARGE_SHARE * memory
    if not is_much and seconds <= LARGE_INVERSION_S:
        return ""
    of_memory = f" of the {memory / 2**30:.1f} GiB of device {device}" if memory is not None else ""
    work = f"{flops / 1e9:,.0f} GFLOP, about {seconds:,.0f} s, in each refresh"
    return f"layer {layer.name or '(model)'} keeps {kept / 2**30:.1f} GiB{of_memory} and inverts {work}"
