"""The paper's claims as criteria on mean curves, and their verdicts.

Every claim is a conjunction of criteria, each one number against a threshold. The paper gives neither numbers nor
spreads, so its words ("almost", "slightly", "far cheaper") are margins fixed here, before the final runs that they
judge were made. One rule decides them all: the estimate and its whole 95 % bootstrap interval must lie strictly on
one side of the threshold.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd

from kfac_sua.campaign.bootstrap import RESAMPLES, interval
from kfac_sua.campaign.targets import (
    BEST_ERROR,
    FINAL_LOSS,
    HALFWAY_ERROR,
    MeanCurve,
    finished_runs,
    mean_curve,
    resampled_curves,
)
from kfac_sua.figures.style import BASELINE, METHODS
from kfac_sua.runs.collect import require_one_precision

if TYPE_CHECKING:
    from numpy.typing import NDArray

Outcome = Literal["holds", "does not hold", "undecided"]
Curves = Mapping[str, MeanCurve]

# "Almost as well", "slightly worse": at most a quarter more epochs, which is little against a preconditioner that
# halves them.
ALMOST = 1.25
# "Far cheaper": half as much again is beyond noise, and yet little against the operations saved (inverting a factor 9
# times as wide takes 9³ = 729 times as many), because the network's own forward and backward pass costs all the same.
FAR_CHEAPER = 1.5
# "The same or better" validation error: half a point, the standard error of an error of 15 % on 5,000 held-out images.
SAME_ERROR_POINTS = 0.5
# "Catches up": the baseline ends less than a point behind, two such standard errors.
CAUGHT_UP_POINTS = 1.0


@dataclasses.dataclass(frozen=True)
class Part:
    """One decided number of a claim.

    Attributes:
        text: What is compared.
        value: The statistic of the mean curves: a ratio, or a difference in percentage points. Infinity if the first
            method never reaches the target; NaN if neither does, or if a method has no finished run.
        low: Lower end of its 95 % interval, NaN if one of the methods has a single seed.
        high: Upper end.
        threshold: What it has to be, such as ``< 1.25``.
        outcome: Whether it is.
    """

    text: str
    value: float
    low: float
    high: float
    threshold: str
    outcome: Outcome


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What the runs say of a claim.

    Attributes:
        claim: Its identifier, such as ``C1``.
        statement: The claim in words.
        outcome: ``holds`` if all parts hold, ``does not hold`` if one does not, otherwise or if a method is missing
            ``undecided``.
        parts: The numbers that decide it.
        seeds: Finished seeds of the method that has the fewest.
        note: Sentences on missing methods, seeds left out and parts without a value; empty if there is nothing to say.
    """

    claim: str
    statement: str
    outcome: Outcome
    parts: tuple[Part, ...]
    seeds: int
    note: str


@dataclasses.dataclass(frozen=True)
class Measure:
    """One number of a method, and how two methods are compared by it.

    Attributes:
        words: What is measured.
        of: A method's and the baseline's curves, ``[..., points]``, to the number, ``[...]``.
        comparison: ``ratio``, or ``points`` for the difference of two errors in percentage points.
        is_timed: Whether it needs seconds that can be compared, those of runs alone on the device.
    """

    words: str
    of: "Callable[[MeanCurve, MeanCurve], NDArray[np.float64]]"
    comparison: Literal["ratio", "points"] = "ratio"
    is_timed: bool = False


@dataclasses.dataclass(frozen=True)
class Criterion:
    """Two methods compared by a measure, and what a claim says of the comparison.

    Attributes:
        measure: What is compared.
        first: Name of a method.
        second: Name of the method that it is divided by or that is subtracted from it.
        side: Where the comparison has to lie: ``<`` or ``>`` the threshold.
        threshold: A ratio, or percentage points.
    """

    measure: Measure
    first: str
    second: str
    side: Literal["<", ">"]
    threshold: float

    @property
    def text(self) -> str:
        """What is compared, such as ``Final training loss, SUA / baseline``."""
        sign = "/" if self.measure.comparison == "ratio" else "−"
        return f"{self.measure.words}, {METHODS[self.first].name} {sign} {METHODS[self.second].name}"

    @property
    def methods(self) -> tuple[str, ...]:
        """Names of the methods needed, each once; the baseline sets the targets."""
        return tuple(dict.fromkeys((self.first, self.second, BASELINE)))

    def statistic(self, curves: Curves) -> "NDArray[np.float64]":
        """Return the comparison, ``[...]``; a ratio is NaN for 0/0 and ∞/∞."""
        first, second = (self.measure.of(curves[name], curves[BASELINE]) for name in (self.first, self.second))
        if self.measure.comparison == "points":
            return 100 * (first - second)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.divide(first, second)


@dataclasses.dataclass(frozen=True)
class Claim:
    """A claim of the paper, decided in one panel.

    Attributes:
        statement: The claim in words.
        panel: Name of the panel.
        criteria: All of them must hold.
    """

    statement: str
    panel: str
    criteria: tuple[Criterion, ...]

    @property
    def methods(self) -> tuple[str, ...]:
        """Names of the methods needed, each once."""
        return tuple(dict.fromkeys(name for criterion in self.criteria for name in criterion.methods))

    @property
    def is_timed(self) -> bool:
        """Whether one of the criteria compares seconds."""
        return any(criterion.measure.is_timed for criterion in self.criteria)


def judge(claim: str, finals: pd.DataFrame) -> Verdict:
    """Decide a claim from the final runs.

    Seeds are resampled per method and independently, although equal seeds share their initial weights: without that
    pairing the intervals are rather too wide, with few seeds rather too narrow (see ``bootstrap.interval``). Seeds
    that diverged, failed or still run are left out of the means and counted in the note.

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


def _part(criterion: Criterion, means: Curves, resamples: Curves) -> Part:
    """Return the number of a criterion, as far as its methods have finished runs, and its outcome."""
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


_EPOCHS_TO_LOSS = Measure("Epochs to the baseline's final training loss", FINAL_LOSS.epochs)
_SECONDS_TO_LOSS = Measure("Seconds to the baseline's final training loss", FINAL_LOSS.seconds, is_timed=True)
_SECONDS_TO_ERROR = Measure("Seconds to the baseline's best validation error", BEST_ERROR.seconds, is_timed=True)
_SECONDS_TO_HALFWAY = Measure(
    "Seconds to the baseline's best validation error in the first half of its epochs",
    HALFWAY_ERROR.seconds,
    is_timed=True,
)
_SECONDS_PER_EPOCH = Measure(
    "Seconds per epoch", lambda curve, _: curve.seconds[..., -1] / curve.epochs[-1], is_timed=True
)
_FINAL_TRAIN_LOSS = Measure("Final training loss", lambda curve, _: curve.train_loss[..., -1])
_BEST_VAL_ERROR = Measure("Best validation error", lambda curve, _: curve.best_val_error, "points")
_FINAL_VAL_ERROR = Measure("Final validation error", lambda curve, _: curve.val_error[..., -1], "points")

# Figure 2 middle and right: the baseline is level at the end, but was behind on the way.
_LATE_CATCH_UP = (
    Criterion(_FINAL_VAL_ERROR, "sua_grouped", BASELINE, ">", -CAUGHT_UP_POINTS),
    Criterion(_SECONDS_TO_LOSS, "sua_grouped", BASELINE, "<", 1.0),
    Criterion(_SECONDS_TO_HALFWAY, "sua_grouped", BASELINE, "<", 1.0),
)

CLAIMS: Mapping[str, Claim] = {
    "C1": Claim(
        "Per epoch, SUA optimises almost as well as full K-FAC.",
        "vgg11",
        (Criterion(_EPOCHS_TO_LOSS, "sua", "kfac", "<", ALMOST),),
    ),
    "C2": Claim(
        "In wall-clock time SUA is far cheaper than full K-FAC, and both beat the batch-norm baseline.",
        "vgg11",
        (
            Criterion(_SECONDS_PER_EPOCH, "kfac", "sua", ">", FAR_CHEAPER),
            Criterion(_SECONDS_TO_ERROR, "sua", "kfac", "<", 1.0),
            Criterion(_SECONDS_TO_ERROR, "sua", BASELINE, "<", 1.0),
            Criterion(_SECONDS_TO_ERROR, "kfac", BASELINE, "<", 1.0),
        ),
    ),
    # "Slightly worse" is tested as "not much worse": groups that cost nothing would not speak against them.
    "C3": Claim(
        "In groups of 32 channels, K-FAC and SUA optimise at most slightly worse per epoch, with the same or"
        " better validation error.",
        "vgg11",
        (
            Criterion(_EPOCHS_TO_LOSS, "grouped", "kfac", "<", ALMOST),
            Criterion(_EPOCHS_TO_LOSS, "sua_grouped", "sua", "<", ALMOST),
            Criterion(_BEST_VAL_ERROR, "grouped", "kfac", "<", SAME_ERROR_POINTS),
            Criterion(_BEST_VAL_ERROR, "sua_grouped", "sua", "<", SAME_ERROR_POINTS),
        ),
    ),
    "C4": Claim(
        "ResNet50 with a constant learning rate: SUA in groups of 64 beats the baseline in training and in validation,"
        " in wall-clock time.",
        "left",
        (
            Criterion(_SECONDS_TO_LOSS, "sua_grouped", BASELINE, "<", 1.0),
            Criterion(_SECONDS_TO_ERROR, "sua_grouped", BASELINE, "<", 1.0),
            Criterion(_FINAL_TRAIN_LOSS, "sua_grouped", BASELINE, "<", 1.0),
            Criterion(_BEST_VAL_ERROR, "sua_grouped", BASELINE, "<", 0.0),
        ),
    ),
    "C5": Claim(
        "ResNet50 with learning rate decay: the baseline catches up late, SUA in groups of 64 still optimises faster.",
        "middle",
        _LATE_CATCH_UP,
    ),
    "C6": Claim(
        "ResNet50 with learning rate decay on CIFAR-100: the same, the baseline catches up late and SUA in groups of 64"
        " still optimises faster.",
        "right",
        _LATE_CATCH_UP,
    ),
}
