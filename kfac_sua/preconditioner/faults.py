"""What becomes of a layer whose statistics or inverse are no good, and what is said where nothing can become of it."""

import math

from kfac_sua.preconditioner.events import EventLog
from kfac_sua.preconditioner.inverse import DAMPING_RAISES
from kfac_sua.preconditioner.preconditioned_layer import PreconditionedLayer
from kfac_sua.preconditioner.refresh import RefreshedLayer
from kfac_sua.preconditioner.settings import DampingRule, FisherType, KroneckerSettings


def drop_statistics(layer: PreconditionedLayer, events: EventLog) -> None:
    """Report that the statistics of a mini-batch were not finite; the layer keeps what it has."""
    meanwhile = "the plain gradient, until its first good refresh" if layer.inverse is None else "its last inverse"
    events.report("non_finite_statistics", layer.name, f"they are dropped and the layer goes on with {meanwhile}")


def take_inverse(
    layer: PreconditionedLayer, result: RefreshedLayer, settings: KroneckerSettings, events: EventLog
) -> None:
    """Replace a layer's inverse, unless the new one failed.

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
        return
    assert result.inverse is not None
    layer.take_inverse(result.inverse)
    if result.num_raised:
        consequence = f"inverting {result.num_raised} of its blocks took up to {result.raised_by} times the damping"
        events.report("raised_damping", layer.name, consequence)


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
