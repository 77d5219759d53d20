"""From measured factors to inverses: damping and inversion of all layers of a refresh together."""

from collections.abc import Sequence

from torch import Tensor

from kfac_sua.preconditioner import damping
from kfac_sua.preconditioner.exchange import SharedInversion
from kfac_sua.preconditioner.factors import LayerFactors
from kfac_sua.preconditioner.geometry import BlockLayout
from kfac_sua.preconditioner.invert import Outcome, eigendecompose_factors, invert_factors
from kfac_sua.preconditioner.kronecker import KroneckerEigenbasis, KroneckerInverse, LayerInverse
from kfac_sua.preconditioner.settings import DampingRule, KroneckerSettings

Refreshed = Outcome[LayerInverse | None]
"""A layer's fresh inverse, and what became of its blocks; ``None`` where they have no eigenbasis."""


def refresh_layers(
    layers: Sequence[LayerFactors],
    layouts: Sequence[BlockLayout],
    settings: KroneckerSettings,
    shared: SharedInversion | None = None,
) -> list[Refreshed]:
    """Invert the damped block of every layer.

    Args:
        layers: Measured factors.
        layouts: The layers' block layouts.
        settings: Damping and its rule.
        shared: Inverts together with other processes; ``None`` for this process alone.

    Returns:
        One outcome per layer, in order.
    """
    if not layers:
        return []
    if settings.damping_rule is DampingRule.exact:
        return _eigenbases(layers, settings, shared)
    return _inverses(layers, layouts, settings, shared)


def _eigenbases(
    layers: Sequence[LayerFactors], settings: KroneckerSettings, shared: SharedInversion | None
) -> list[Refreshed]:
    factors = [side for layer in layers for side in (layer.activation, layer.gradient)]
    bases = shared.eigendecompose_factors(factors) if shared else eigendecompose_factors(factors)
    refreshed = []
    for layer, activation, gradient in zip(layers, bases[::2], bases[1::2], strict=True):
        if activation is None or gradient is None:
            refreshed.append(Refreshed(None, num_failed=1))
        else:
            numbers = (gradient.values.new_full((), number) for number in (layer.scale, settings.damping))
            refreshed.append(Refreshed(KroneckerEigenbasis(activation, gradient, *numbers)))
    return refreshed


def _inverses(
    layers: Sequence[LayerFactors],
    layouts: Sequence[BlockLayout],
    settings: KroneckerSettings,
    shared: SharedInversion | None,
) -> list[Refreshed]:
    factors, dampings, bias_scales = [], [], []
    for layer, layout in zip(layers, layouts, strict=True):
        for_activation, for_gradient = _dampings(layer, layout, settings)  # [conv_groups] each
        factors += [layer.activation, layer.gradient]
        dampings.append(for_activation.repeat_interleave(layout.activation.count))
        dampings.append(for_gradient.repeat_interleave(layout.gradient.count))
        bias_scales.append((1 + for_activation).reciprocal())
    results = shared.invert_factors(factors, dampings) if shared else invert_factors(factors, dampings)
    refreshed = []
    for layer, activation, gradient, bias_scale in zip(layers, results[::2], results[1::2], bias_scales, strict=True):
        gradient.inverse.scale_(1 / layer.scale)
        inverse = KroneckerInverse(activation.inverse, gradient.inverse, bias_scale)
        refreshed.append(Refreshed.joined(inverse, [activation, gradient]))
    return refreshed


def _dampings(layer: LayerFactors, layout: BlockLayout, settings: KroneckerSettings) -> tuple[Tensor, Tensor]:
    """Return the damping of the activation and of the gradient factor, ``[conv_groups]`` each."""
    if settings.damping_rule is DampingRule.factored:
        root = damping.factored(settings.damping, layer.scale)
        both = layer.gradient.values.new_full((layout.conv_groups,), root)
        return both, both
    activation_traces, gradient_traces = layer.activation.traces(), layer.gradient.traces()
    return damping.factored_pi(
        settings.damping,
        layer.scale,
        activation_traces.view(layout.conv_groups, -1).sum(-1) / layout.activation_dim,  # of [conv_groups, Q]
        gradient_traces.view(layout.conv_groups, -1).sum(-1) / layout.gradient_dim,  # of [conv_groups, P]
    )
