"""Verdicts on the paper's claims from final runs, and how far they depend on the rule that chose the cells.

One rule decides them all: the estimate and its whole 95 % bootstrap interval must lie strictly on one side of the
threshold.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
import pandas as pd

from kfac_sua.campaign.bootstrap import RESAMPLES, interval
from kfac_sua.campaign.claims import CLAIMS, Claim, Criterion, Curves
from kfac_sua.campaign.selection import Rule, best_fingerprint
from kfac_sua.campaign.targets import finished_runs, mean_curve, resampled_curves
from kfac_sua.runs.final_table import require_one_precision

Outcome = Literal["holds", "does not hold", "undecided"]


@dataclasses.dataclass(frozen=True)
class Part:
    """One decided number of a claim.

    Attributes:
        text: What is compared.
        value: The statistic of the mean curves: a ratio, or a difference in percentage points. It is infinite if the
            first method never reaches the target, and NaN if neither does or a method has no finished run.
        low: Lower end of its 95 % interval, NaN if one of the methods has a single seed.
        high: Upper end.
        threshold: What it has to be, such as ``< 1.25``.
        outcome: Whether the value meets the threshold.
    """

    text: str
    value: float
    low: float
    high: float
    threshold: str
    outcome: Outcome


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What the runs say about a claim.

    Attributes:
        claim: Its identifier, such as ``C1``.
        statement: The claim in words.
        outcome: ``holds`` if all parts hold, ``does not hold`` if one does not; ``undecided`` otherwise, and if a
            method is missing.
        parts: The numbers that decide it.
        seeds: The fewest finished seeds of any method.
        note: Sentences on missing methods, seeds left out and parts without a value; empty if there is nothing to say.
    """

    claim: str
    statement: str
    outcome: Outcome
    parts: tuple[Part, ...]
    seeds: int
    note: str


def judge(claim: str, finals: pd.DataFrame) -> Verdict:
    """Decide a claim from the final runs.

    Seeds are resampled for each method by itself, although equal seeds share their initial weights. Ignoring these
    pairs makes the intervals too wide; having few seeds makes them too narrow (see ``bootstrap.interval``). Seeds that
    diverged, failed or still run are left out of the means and counted in the note.

    Args:
        claim: Its identifier, a key of ``CLAIMS``.
        finals: Rows of ``collect_runs`` with ``panel`` and ``method``, one setting for each pair of these.

    Returns:
        The verdict; undecided, with a note, if a method has no finished run.

    Raises:
        ValueError: If there is no such claim.
        CollectError: If a method has several settings, or the claim is about seconds and its runs are of several
            precisions.
    """
    if claim not in CLAIMS:
        raise ValueError(f"There is no claim {claim!r}; known are {', '.join(CLAIMS)}.")
    definition = CLAIMS[claim]
    if definition.is_timed:
        is_compared = (finals["panel"] == definition.panel) & finals["method"].isin(definition.methods)
        require_one_precision(finals[is_compared])
    runs = {method: finished_runs(finals, definition.panel, method) for method in definition.methods}
    seeds = {method: rows["seed"].nunique() for method, rows in runs.items()}
    means = {method: mean_curve(rows) for method, rows in runs.items() if len(rows)}
    resamples = {
        method: resampled_curves(runs[method], RESAMPLES, f"{definition.panel}/{method}")
        for method, count in seeds.items()
        if count > 1
    }
    parts = tuple(_part(criterion, means, resamples) for criterion in definition.criteria)
    outcome = _conjunction(parts) if len(means) == len(runs) else "undecided"
    note = " ".join([*_run_notes(finals, definition), *_value_notes(definition, parts, means)])
    return Verdict(claim, definition.statement, outcome, parts, min(seeds.values()), note)


def rule_table(grid: pd.DataFrame, claims: Sequence[str], val_size: int) -> pd.DataFrame:
    """Return the deciding numbers of the claims from the runs of the grid, for the cells that each rule chooses.

    The runs of the grid have one seed and are often shorter than the final runs. So these numbers have no interval and
    decide nothing; they show whether another rule would point the other way. Numbers that need seconds are left out,
    since runs of the grid share the device.

    Args:
        grid: Rows of ``collect_cells`` of all grids.
        claims: Keys of ``CLAIMS``.
        val_size: Number of held-out images, for the standard error.

    Returns:
        ``claim``, ``part`` (what is compared), ``threshold``, and one column per rule.
    """
    table: dict[tuple[str, str, str], dict[str, float]] = {}
    for rule in Rule:
        curves = grid.groupby(["panel", "method"], sort=False)
        chosen = {key: best_fingerprint(runs, rule, val_size) for key, runs in curves}
        keys = zip(grid["panel"], grid["method"], strict=True)
        kept = grid[[chosen[key] == fingerprint for key, fingerprint in zip(keys, grid["fingerprint"], strict=True)]]
        for claim in claims:
            for criterion, part in zip(CLAIMS[claim].criteria, judge(claim, kept).parts, strict=True):
                if criterion.measure.is_timed:
                    continue
                table.setdefault((claim, part.text, part.threshold), {})[str(rule)] = part.value
    rows = [dict(zip(("claim", "part", "threshold"), key, strict=True)) | values for key, values in table.items()]
    return pd.DataFrame(rows, columns=["claim", "part", "threshold", *map(str, Rule)])


def _part(criterion: Criterion, means: Curves, resamples: Curves) -> Part:
    """Return a criterion's number, NaN where a method has no finished run, and its outcome."""
    value = low = high = math.nan
    if means.keys() >= set(criterion.methods):
        value = float(criterion.statistic(means))
    if resamples.keys() >= set(criterion.methods):
        low, high = interval(criterion.statistic(resamples))
    unit = " points" if criterion.measure.comparison == "points" else ""
    threshold = f"{criterion.side} {criterion.threshold:g}{unit}"
    return Part(criterion.text, value, low, high, threshold, _decide(criterion, value, low, high))


def _decide(criterion: Criterion, value: float, low: float, high: float) -> Outcome:
    """Return the outcome of a part; every comparison with a NaN is false and leaves it undecided."""
    numbers = np.array([value, low, high])
    is_below, is_above = bool((numbers < criterion.threshold).all()), bool((numbers > criterion.threshold).all())
    if not is_below and not is_above:
        return "undecided"
    return "holds" if is_below == (criterion.side == "<") else "does not hold"


def _conjunction(parts: tuple[Part, ...]) -> Outcome:
    """Return the outcome of a claim all of whose methods have finished runs."""
    outcomes = {part.outcome for part in parts}
    if "does not hold" in outcomes:
        return "does not hold"
    return "undecided" if "undecided" in outcomes else "holds"


def _run_notes(finals: pd.DataFrame, claim: Claim) -> Iterator[str]:
    """Yield a sentence per method whose runs are missing, single, diverged, failed or still running."""
    runs = finals[finals["panel"] == claim.panel].drop_duplicates(["method", "run"])
    for method in claim.methods:
        counts = runs.loc[runs["method"] == method, "status"].value_counts()
        finished = int(counts.get("finished", 0))
        words = {"diverged": "diverged", "failed": "failed", "running": "still running"}
        others = [f"{counts[status]} {text}" for status, text in words.items() if counts.get(status, 0)]
        left_out = f"of {counts.sum()} seeds {' and '.join(others)}"
        if not finished:
            yield f"No finished run of {method}{f' ({left_out})' if others else ''}."
            continue
        if others:
            yield f"{method}: {left_out}, left out of its mean."
        if finished == 1:
            yield f"{method}: one finished seed, so no interval."


def _value_notes(claim: Claim, parts: tuple[Part, ...], means: Curves) -> Iterator[str]:
    """Yield a sentence per part that has no value although its methods have finished runs."""
    for criterion, part in zip(claim.criteria, parts, strict=True):
        if math.isnan(part.value) and means.keys() >= set(criterion.methods):
            yield f"{part.text}: no value, as neither reaches the target or both start below it."
