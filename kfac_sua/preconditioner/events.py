"""Events: what goes wrong without stopping the training, what follows for the layer, and how it is reported.

Every event is counted; the first one of its kind in each layer is logged. What does stop the training is an error,
whose text is here too.
"""

import logging
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from enum import Enum
from itertools import product

from kfac_sua.preconditioner.invert import DAMPING_RAISES
from kfac_sua.preconditioner.kronecker import LayerInverse
from kfac_sua.preconditioner.layer import PreconditionedLayer
from kfac_sua.preconditioner.model.changes import is_frozen
from kfac_sua.preconditioner.model.used_gradient import is_unchanged
from kfac_sua.preconditioner.plain_numbers import plain_number, shown
from kfac_sua.preconditioner.refresh import Refreshed
from kfac_sua.preconditioner.registry import structure_class
from kfac_sua.preconditioner.settings import DampingRule, FisherType, KroneckerSettings

logger = logging.getLogger("kfac_sua.preconditioner.events")  # named for what it logs


class EventLog:
    """Counts of events under ``kind:layer``."""

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
    """Report layers whose inputs have another first dimension, which counts the examples, than the model's inputs.

    If the model's is not known, or no layer has it, as when the batch is the second dimension of its inputs, layers are
    compared with the first dimension that most of them have.
    """
    counts = {layer.name: layer.statistics.num_examples for layer in layers if layer.statistics.num_counted}
    of_model = {layer.name: layer.statistics.num_model_examples for layer in layers}
    usual = max(Counter(counts.values()).items(), key=lambda item: item[::-1], default=(0, 0))[0]
    is_known = any(count == of_model[name] for name, count in counts.items())
    for name, count in counts.items():
        known = of_model[name] if is_known else None
        expected, whose = (usual, "most layers") if known is None else (known, "the inputs of the model")
        if count != expected:
            consequence = (
                f"the first dimension of its inputs, {count}, counts as examples, but {whose} have {expected}, so "
                f"that its factors are scaled differently: put the batch first, or list the layer in skip"
            )
            events.report("other_examples", name, consequence)


def report_missing(layer: PreconditionedLayer, events: EventLog, *, is_gone: bool, was_empty: bool) -> None:
    """Report why a layer has no statistics of a mini-batch, and what follows.

    Args:
        layer: The layer.
        events: The log.
        is_gone: Whether it had statistics, but their gradient was thrown away before the step.
        was_empty: Whether it was called with no examples.
    """
    if is_frozen(layer.module):
        return  # reported where its gradient would be preconditioned
    meanwhile = "the plain gradient" if layer.inverse is None else "its last inverse"
    if is_gone:
        consequence = f"the gradient that belonged to its statistics was gone at step(); it goes on with {meanwhile}"
        events.report("gradient_gone", layer.name, consequence)
    elif was_empty:
        consequence = f"all its calls had 0 examples; it goes on with {meanwhile}, until a refresh that has some"
        events.report("no_examples", layer.name, consequence)
    elif layer.has_gradient():
        consequence = (
            f"it got a gradient that no recorded call brought, as when its weight is used without calling it, its "
            f"forward pass ran before the last step, or fisher_backward() does not reach it; it goes on with "
            f"{meanwhile}: list it in skip if that is meant"
        )
        events.report("call_not_seen", layer.name, consequence)
    else:
        consequence = f"it goes on with {meanwhile}, until a refresh whose loss reaches it"
        events.report("not_reached", layer.name, consequence)


class GradientEvent(Enum):
    """Events of a layer's gradient, in the order of ``capture.Settled.flags``: the kind and its consequence."""

    UNEXPLAINED = (
        "gradient_not_explained",
        "part of its weight gradient does not come from the calls that its statistics were measured in, as when the "
        "weight is also used without calling the layer, or by a penalty (on its squares apart): list the layer in skip "
        "unless that is meant",
    )
    REPLACED = (
        "gradient_replaced",
        "its gradient at step() is zero, or not that of the passes that its statistics were measured in: let "
        "zero_grad() throw gradients away and autograd add them up, not .data or copies, or call discard() before "
        "those that count",
    )
    ADDED_TO_USED = (
        "used_gradient",
        "its gradients were added to those of the step before, already preconditioned, which step() preconditions once "
        "more: call optimizer.zero_grad() before loss.backward()",
    )

    def report(self, layer_name: str, events: EventLog) -> None:
        """Report the event for a layer."""
        kind, consequence = self.value
        events.report(kind, layer_name, consequence)


def report_gradient_events(layer_names: Sequence[str], flags: Sequence[bool], events: EventLog) -> None:
    """Report the events of the layers' gradients.

    Args:
        layer_names: All layers.
        flags: Whether the event occurred, for each :class:`GradientEvent` and then for each layer.
        events: The log.
    """
    for (event, name), has_occurred in zip(product(GradientEvent, layer_names), flags, strict=True):
        if has_occurred:
            event.report(name, events)


def layers_to_precondition(layers: Iterable[PreconditionedLayer], events: EventLog) -> list[PreconditionedLayer]:
    """Return the layers that have a gradient which has not been preconditioned before.

    Args:
        layers: All layers.
        events: The log, for gradients that are missing or have been preconditioned.

    Raises:
        RuntimeError: If all gradients have been preconditioned before.
    """
    trainable = [layer for layer in layers if not is_frozen(layer.module)]
    present = [layer for layer in trainable if layer.weight.grad is not None]
    if trainable and not present:
        consequence = (
            "no layer has a gradient at step(), so that nothing is preconditioned: call step() after loss.backward() "
            "and before the gradients are used or zeroed; an optimizer that steps inside the backward pass cannot be "
            "combined with a preconditioner"
        )
        events.report("no_gradient", "(model)", consequence)
    used = [layer for layer in present if layer.is_preconditioned]
    if used and len(used) == len(present) and any(layer.has_gradient() for layer in used):
        raise RuntimeError(
            f"The gradient of layer {used[0].name!r} and all others have been preconditioned already, by this or by "
            f"another preconditioner of the model: call step() of one of them, once after each loss.backward(); a "
            f"gradient of your own is to be assigned to .grad, not written into it."
        )
    used = [layer for layer in used if is_unchanged(layer.weight)]  # the others were zeroed, or written anew
    for layer in used:
        consequence = (
            "its gradient is still that of the step before, already preconditioned, and is left as it is: call "
            "optimizer.zero_grad() before loss.backward()"
        )
        events.report("used_gradient", layer.name, consequence)
    names = {layer.name for layer in used}
    return [layer for layer in present if layer.name not in names]


def report_frozen(layer: PreconditionedLayer, events: EventLog) -> None:
    """Report a layer whose weight has been frozen since the preconditioner was made."""
    events.report("frozen", layer.name, "it is left alone, and a trainable bias gets the plain gradient")


def drop_statistics(layer: PreconditionedLayer, events: EventLog) -> None:
    """Report that a layer's statistics of a mini-batch were not finite; it keeps its average and its inverse."""
    meanwhile = "the plain gradient, until its first good refresh" if layer.inverse is None else "its last inverse"
    events.report("non_finite_statistics", layer.name, f"they are dropped and the layer goes on with {meanwhile}")


def usable_inverse(
    layer: PreconditionedLayer, result: Refreshed, settings: KroneckerSettings, events: EventLog
) -> LayerInverse | None:
    """Return a layer's new inverse; ``None`` if it failed.

    Args:
        layer: The layer.
        result: What a refresh made for it.
        settings: Settings of the refresh.
        events: The log, for a failure or a damping that had to be raised.

    Raises:
        RuntimeError: If it failed and the layer has no earlier one.
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


def report_small_damping(layer_name: str, events: EventLog, settings: KroneckerSettings) -> None:
    """Report a damping that is too small beside a layer's eigenvalues for float32 to resolve."""
    consequence = (
        f"damping {settings.damping:g} is so small beside the trace of its Fisher block, or of one of its factors, "
        f"that its preconditioned gradient may be off by 1 % and more in float32: raise the damping, centre and scale "
        f"the inputs, or train in float64"
    )
    events.report("small_damping", layer_name, consequence)


def nothing_recorded(fisher_type: FisherType) -> str:
    """Return the error of a step that needs statistics and has none."""
    if fisher_type is FisherType.empirical:
        return (
            "step() needs statistics of this mini-batch, but no backward pass through the model was recorded whose "
            "gradients are there: call loss.backward() with gradients enabled, after constructing the preconditioner, "
            "on the model that it was made for (of a compiled model, what torch.compile returned; not a copy), after a "
            "forward pass since the last step, and step() before the gradients are used or zeroed (not with an "
            "optimizer that steps in the backward pass)."
        )
    return (
        f"step() needs statistics of this mini-batch: with fisher_type={fisher_type} call fisher_backward(outputs) "
        f"between the forward pass and loss.backward()."
    )


def checked_loss_factor(name: str, value: object) -> float:
    """Return a factor of the loss as a Python number.

    Args:
        name: ``loss_scale`` or ``loss_weight``.
        value: The value given for it.

    Raises:
        ValueError: If gradients cannot be divided by it.
    """
    number = plain_number(value)
    if number is None or not 0 < number <= sys.float_info.max:
        cure = "; pass scaler.get_scale(), read before scaler.update()" if name == "loss_scale" else ""
        got = shown(value) if number is None else number
        raise ValueError(f"{name} must be the finite number > 0 that the loss was multiplied with, got {got}{cure}.")
    return number


def _first_inverse_failed(name: str, num_failed: int, settings: KroneckerSettings) -> str:
    if settings.damping_rule is DampingRule.exact:
        return (
            f"The factors of layer {name!r} have no eigendecomposition that converges, in float64 neither, as "
            f"damping_rule=exact needs; use damping_rule=factored."
        )
    if not structure_class(settings.structure).has_sides:
        return (
            f"The block of layer {name!r} cannot be inverted, also with {DAMPING_RAISES[-1]} times the damping "
            f"{settings.damping:g}; raise the damping, or use another structure than {settings.structure}."
        )
    return (
        f"The factors of layer {name!r} cannot be inverted ({num_failed} blocks, also in float64 and with "
        f"{DAMPING_RAISES[-1]} times their damping) with damping {settings.damping:g}; raise the damping."
    )
