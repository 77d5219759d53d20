"""What goes wrong without stopping the training, what follows for the layer, and what is said where nothing can follow.

Nothing is left out in silence: events are counted always, and logged once per kind and layer.
"""

import logging
import math
from collections import Counter
from collections.abc import Iterable

from kfac_sua.preconditioner.changes import is_frozen
from kfac_sua.preconditioner.invert import DAMPING_RAISES
from kfac_sua.preconditioner.kronecker import LayerInverse
from kfac_sua.preconditioner.layer import PreconditionedLayer
from kfac_sua.preconditioner.refresh import Refreshed
from kfac_sua.preconditioner.settings import DampingRule, FisherType, KroneckerSettings

logger = logging.getLogger("kfac_sua.preconditioner.events")  # named for what it logs


class EventLog:
    """Counts of events, under ``kind:layer``."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def report(self, kind: str, layer_name: str, consequence: str) -> None:
        """Count an event, and log the first one of its kind in its layer as a warning.

        Args:
            kind: What happened, an identifier such as ``failed_inverse``.
            layer_name: Where.
            consequence: What follows from it, for the message.
        """
        key = f"{kind}:{layer_name}"
        self.counts[key] += 1
        if self.counts[key] == 1:
            logger.warning("%s: %s; %s.", layer_name, kind.replace("_", " "), consequence)


def report_other_examples(layers: Iterable[PreconditionedLayer], events: EventLog) -> None:
    """Name layers whose inputs have another first dimension than most: it counts as examples."""
    counts = {layer.name: count for layer in layers if (count := layer.statistics.num_examples)}
    usual = max(Counter(counts.values()).items(), key=lambda item: item[::-1], default=(0, 0))[0]
    for name, count in counts.items():
        if count != usual:
            consequence = (
                f"the first dimension of its inputs, {count}, counts as examples, but most layers have {usual}, so "
                f"that its factors are scaled differently: put the batch first, or list the layer in skip"
            )
            events.report("other_examples", name, consequence)


def report_missing(layer: PreconditionedLayer, events: EventLog) -> None:
    """Say why a layer has no statistics of a mini-batch, and what follows."""
    if is_frozen(layer.module):
        return  # reported where its gradient would be preconditioned
    meanwhile = "the plain gradient" if layer.inverse is None else "its last inverse"
    if layer.has_gradient():
        consequence = (
            f"it got a gradient, as when its weight is used without calling it, and goes on with {meanwhile}: list it "
            f"in skip if that is meant"
        )
        events.report("call_not_seen", layer.name, consequence)
    else:
        consequence = f"it goes on with {meanwhile}, until a refresh whose loss reaches it"
        events.report("not_reached", layer.name, consequence)


def report_frozen(layer: PreconditionedLayer, events: EventLog) -> None:
    """Say what happens to a layer whose weight has been frozen since the preconditioner was made."""
    events.report("frozen", layer.name, "it is left alone, and a trainable bias gets the plain gradient")


def drop_statistics(layer: PreconditionedLayer, events: EventLog) -> None:
    """Report that the statistics of a mini-batch were not finite; the layer keeps what it has."""
    meanwhile = "the plain gradient, until its first good refresh" if layer.inverse is None else "its last inverse"
    events.report("non_finite_statistics", layer.name, f"they are dropped and the layer goes on with {meanwhile}")


def usable_inverse(
    layer: PreconditionedLayer, result: Refreshed, settings: KroneckerSettings, events: EventLog
) -> LayerInverse | None:
    """Return a layer's new inverse; ``None`` if it failed.

    Args:
        layer: The layer.
        result: What a refresh made for it.
        settings: Those of the refresh.
        events: Where a failure, or a damping that had to be raised, is reported.

    Raises:
        RuntimeError: If it failed and the layer has none.
    """
    if result.num_failed and layer.inverse is None:
        raise RuntimeError(_first_inverse_failed(layer.name, result.num_failed, settings))
    if result.num_failed:
        events.report("failed_inverse", layer.name, "its last good inverse stays")
        return None
    if result.num_raised:
        consequence = f"inverting {result.num_raised} of its blocks took up to {result.raised_by} times the damping"
        events.report("raised_damping", layer.name, consequence)
    return result.inverse


def nothing_recorded(fisher_type: FisherType) -> str:
    """Return why a step that needs statistics has none, in one sentence."""
    if fisher_type is FisherType.empirical:
        return (
            "step() needs statistics of this mini-batch, but no backward pass through the model was recorded: call "
            "loss.backward() with gradients enabled, after constructing the preconditioner, on the model that it "
            "was made for (of a compiled model, what torch.compile returned; not a copy)."
        )
    return (
        f"step() needs statistics of this mini-batch: with fisher_type={fisher_type} call fisher_backward(outputs) "
        f"between the forward pass and loss.backward()."
    )


def validate_loss_factor(name: str, value: float) -> None:
    """Raise ``ValueError`` unless what the loss was multiplied with can be divided out again.

    Args:
        name: ``loss_scale`` or ``loss_weight``.
        value: What was given for it.
    """
    if not (math.isfinite(value) and value > 0):
        cure = "; pass scaler.get_scale(), read before scaler.update()" if name == "loss_scale" else ""
        raise ValueError(f"{name} must be the finite number > 0 that the loss was multiplied with, got {value}{cure}.")


def _first_inverse_failed(name: str, num_failed: int, settings: KroneckerSettings) -> str:
    if settings.damping_rule is DampingRule.exact:
        return (
            f"The factors of layer {name!r} have no eigendecomposition that converges, in float64 neither, as "
            f"damping_rule=exact needs; use damping_rule=factored."
        )
    return (
        f"The factors of layer {name!r} cannot be inverted ({num_failed} blocks, also in float64 and with "
        f"{DAMPING_RAISES[-1]} times their damping) with damping {settings.damping:g}; raise the damping."
    )
