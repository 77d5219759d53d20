"""Measures what a study lacks, layer by layer, and keeps each measurement at once."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from kfac_sua.bench.scaling.cases import Case, Layer, by_layer
from kfac_sua.bench.scaling.measure import Measurement, measure_layer


@dataclass(frozen=True)
class StudySettings:
    """How to measure.

    Args:
        device: Where.
        repeats: Fewest turns after the warm-up, ≥ 1.
        memory_limit_gib: A case that needs more GiB is not measured.
        commit: Commit of the source, to be kept with the numbers.
    """

    device: torch.device
    repeats: int
    memory_limit_gib: float
    commit: str


def missing_cases(cases: Sequence[Case], known: Mapping[Case, Measurement], repeats: int) -> list[Case]:
    """Return the cases without a measurement of as many repeats, including those that were left out before."""
    return [case for case in cases if case not in known or known[case].note != "" or known[case].repeats < repeats]


def measure_missing(
    cases: Sequence[Case],
    known: Mapping[Case, Measurement],
    settings: StudySettings,
    *,
    keep: Callable[[Mapping[Case, Measurement]], None],
    tell: Callable[[str], None],
) -> dict[Case, Measurement]:
    """Measure what is missing.

    Args:
        cases: What is wanted.
        known: What has been measured before.
        settings: How to measure.
        keep: Called with everything known after each layer.
        tell: Called with a line before and after each layer.

    Returns:
        ``known`` and the new measurements.

    Raises:
        RuntimeError: If the device runs out of memory.
    """
    results = dict(known)
    layers = by_layer(missing_cases(cases, known, settings.repeats))
    for position, (layer, wanted) in enumerate(layers.items(), start=1):
        tell(f"[{position}/{len(layers)}] {layer}: {len(wanted)} cases")
        started = time.perf_counter()
        results |= _measure(layer, wanted, settings)
        keep(results)
        tell(f"[{position}/{len(layers)}] {layer}: done in {time.perf_counter() - started:.1f} s")
    return results


def _measure(layer: Layer, cases: Sequence[Case], settings: StudySettings) -> dict[Case, Measurement]:
    """Measure the cases of one layer that fit into memory; the others get a note on what they need."""
    excluded = {
        case: Measurement({}, repeats=0, note=f"not measured: needs {case.needed_gib():.3g} GiB")
        for case in cases
        if case.needed_gib() > settings.memory_limit_gib
    }
    fitting = [case for case in cases if case not in excluded]
    measured = measure_layer(layer, fitting, settings.device, settings.repeats) if fitting else {}
    if settings.device.type == "cuda":
        torch.cuda.empty_cache()  # the next layer has other sizes
    return excluded | {case: replace(result, commit=settings.commit) for case, result in measured.items()}
