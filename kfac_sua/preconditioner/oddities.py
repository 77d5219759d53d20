"""What a mini-batch's recorded calls say about a foreign model, reported as events: nothing is left out in silence."""

from collections import Counter
from collections.abc import Iterable

from kfac_sua.preconditioner.changes import is_frozen
from kfac_sua.preconditioner.events import EventLog
from kfac_sua.preconditioner.preconditioned_layer import PreconditionedLayer


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
