"""From measured factors to inverses: damping and inversion of all layers of a refresh together."""

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from kfac_sua.preconditioner import damping, invert
from kfac_sua.preconditioner.factors import LayerFactors
from kfac_sua.preconditioner.forms import Factor
from kfac_sua.preconditioner.forms.cost import SideCost
from kfac_sua.preconditioner.forms.factor import traces_of
from kfac_sua.preconditioner.geometry import BlockLayout
from kfac_sua.preconditioner.invert import Inverter, Outcome
from kfac_sua.preconditioner.kronecker import KroneckerEigenbasis, KroneckerInverse, LayerInverse
from kfac_sua.preconditioner.settings import DampingRule, KroneckerSettings

FLOAT64_BELOW = 1e-3
"""Exact damping, as a share of a block's trace, below which factors are decomposed in float64. Eigenvalues in float32
are off by about 1e-7 of the largest one; the damping is added to them, and at a share of 1e-3 the error is 1e-4 of it.
"""

SMALL_DAMPING = {DampingRule.factored: 1e-7, DampingRule.factored_pi: 1e-7, DampingRule.exact: 1e-6}
"""Damping, as a share of a block's trace, below which preconditioned gradients in float32 may be off by 1 % and more,
measured against float64 (``tests/preconditioner/test_small_damping.py``)."""

SMALL_ON_A_SIDE = 1e-6
"""The same for √(ε/scale) as a share of one factor's trace, under the rule that adds it to both factors alike: inputs
whose mean is far from zero make one factor large and leave the other as it is."""

Refreshed = Outcome[LayerInverse | None]
"""A layer's new inverse, ``None`` if its blocks have no eigenbasis, and how many blocks failed or were repaired."""


def refresh_layers(
    layers: Sequence[LayerFactors],
    layouts: Sequence[BlockLayout],
    costs: Sequence[tuple[SideCost, SideCost]],
    settings: KroneckerSettings,
    inverter: Inverter = invert,
) -> list[Refreshed]:
    """Invert the damped block of every layer.

    Args:
        layers: Measured factors.
        layouts: The layers' block layouts.
        costs: Work on the activation and on the gradient side of each, by which their inverses' forms are chosen.
        settings: Damping and its rule.
        inverter: Inverts the damped factors, by itself or together with other processes.

    Returns:
        One outcome per layer, in order.
    """
    if not layers:
        return []
    if settings.damping_rule is DampingRule.exact:
        return _eigenbases(layers, settings, inverter)
    return _inverses(layers, layouts, costs, settings, inverter)


def _eigenbases(layers: Sequence[LayerFactors], settings: KroneckerSettings, inverter: Inverter) -> list[Refreshed]:
    """Return the eigenbases of every layer, for exact damping."""
    are_small = damping_shares(layers, settings).prod(0) < FLOAT64_BELOW
    factors: list[Factor] = []
    for layer, is_small in zip(layers, are_small.tolist(), strict=True):
        sides = (layer.activation, layer.gradient)
        factors += [side.with_values(side.values.double()) for side in sides] if is_small else sides
    bases = inverter.eigendecompose_factors(factors)
    refreshed = []
    for layer, activation, gradient in zip(layers, bases[::2], bases[1::2], strict=True):
        if activation is None or gradient is None:
            refreshed.append(Refreshed(None, num_failed=1))
        else:
            like = layer.gradient.values
            numbers = (like.new_full((), number) for number in (layer.scale, settings.damping))
            bases_of_layer = activation.to(like.dtype), gradient.to(like.dtype)
            refreshed.append(Refreshed(KroneckerEigenbasis(*bases_of_layer, *numbers)))
    return refreshed


def damping_shares(layers: Sequence[LayerFactors], settings: KroneckerSettings) -> Tensor:
    """Return √(ε/scale) as a share of the trace of each layer's factors, ``[2, layers]``, on the device.

    The product of a layer's two shares is the share of ε in the trace of its Fisher block. A trace is at least as large
    as the largest eigenvalue, so that √(ε/scale) is at least as large a share of that eigenvalue.
    """
    roots = [layer.scale**0.5 for layer in layers]
    sides = [layer.activation for layer in layers], [layer.gradient for layer in layers]
    traces = torch.stack([traces_of(factors, roots) for factors in sides])  # [2, layers]
    return settings.damping**0.5 / traces.clamp(min=torch.finfo(traces.dtype).tiny)


def small_dampings(layers: Sequence[LayerFactors], settings: KroneckerSettings) -> Tensor:
    """Return of each layer whether its damping is too small for the precision of its factors, ``[layers]``."""
    shares = damping_shares(layers, settings)
    product = shares.prod(0)
    is_small = product < SMALL_DAMPING[settings.damping_rule]
    if settings.damping_rule is DampingRule.factored:
        is_small |= shares.amin(0) < SMALL_ON_A_SIDE
    is_small &= product > 0  # beside what is infinite it is 0
    in_float32 = [layer.gradient.values.dtype != torch.float64 for layer in layers]
    if all(in_float32):
        return is_small
    return is_small & torch.tensor(in_float32).to(shares.device) if any(in_float32) else torch.zeros_like(is_small)


def _inverses(
    layers: Sequence[LayerFactors],
    layouts: Sequence[BlockLayout],
    costs: Sequence[tuple[SideCost, SideCost]],
    settings: KroneckerSettings,
    inverter: Inverter,
) -> list[Refreshed]:
    factors, dampings, bias_dampings = [], [], []
    filled = lru_cache(maxsize=None)(_filled)  # many layers have the same number of locations
    for layer, layout in zip(layers, layouts, strict=True):
        for_activation, for_gradient = _dampings(layer, layout, settings, filled)  # [conv_groups] each
        factors += [layer.activation, layer.gradient]
        dampings.append(_of_blocks(for_activation, layout.activation.count))
        dampings.append(_of_blocks(for_gradient, layout.gradient.count))
        bias_dampings.append(for_activation)
    bias_scales = torch._foreach_reciprocal(torch._foreach_add(bias_dampings, 1))
    results = inverter.invert_factors(factors, dampings)
    torch._foreach_mul_([one.inverse.linear_tensor for one in results[1::2]], [1 / layer.scale for layer in layers])
    refreshed = []
    for activation, gradient, bias_scale, (of_activation, of_gradient) in zip(
        results[::2], results[1::2], bias_scales, costs, strict=True
    ):
        sides = of_activation.in_cheapest_form(activation.inverse), of_gradient.in_cheapest_form(gradient.inverse)
        refreshed.append(Refreshed.combined(KroneckerInverse(*sides, bias_scale), [activation, gradient]))
    return refreshed


def _of_blocks(dampings: Tensor, num_blocks: int) -> Tensor:
    """Return the damping of every block, ``[conv_groups · num_blocks]``, from those of convolution groups."""
    return dampings[:, None].expand(-1, num_blocks).reshape(-1)  # [conv_groups · num_blocks]; a view of one group


def _filled(number: float, size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.full((size,), number, device=device, dtype=dtype)


def _dampings(
    layer: LayerFactors,
    layout: BlockLayout,
    settings: KroneckerSettings,
    filled: Callable[[float, int, torch.device, torch.dtype], Tensor],
) -> tuple[Tensor, Tensor]:
    """Return the damping of the activation and of the gradient factor, ``[conv_groups]`` each."""
    if settings.damping_rule is DampingRule.factored:
        root = damping.factored(settings.damping, layer.scale)
        values = layer.gradient.values
        both = filled(root, layout.conv_groups, values.device, values.dtype)
        return both, both
    activation_traces, gradient_traces = layer.activation.traces(), layer.gradient.traces()
    return damping.factored_pi(
        settings.damping,
        layer.scale,
        activation_traces.view(layout.conv_groups, -1).sum(-1) / layout.activation_dim,  # of [conv_groups, Q]
        gradient_traces.view(layout.conv_groups, -1).sum(-1) / layout.gradient_dim,  # of [conv_groups, P]
    )
