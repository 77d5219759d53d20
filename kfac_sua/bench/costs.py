"""Time of every setting as a ratio to plain SGD's step, measured step by step in turns.

A machine that slows down then slows all settings. Times are medians over rounds; where the whole measurement is
repeated, every number is the median over repeats, with the least and the largest.
"""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence

from kfac_sua.bench.contender import CAPTURED, PHASES, Contender, StepTime
from kfac_sua.bench.progress import Announcer
from kfac_sua.bench.step_kinds import StepKind

Times = dict[StepKind, list[StepTime]]


@dataclasses.dataclass(frozen=True)
class Spread:
    """A number over the repeats of the measurement."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Summarise the values of the repeats."""
        return cls(statistics.median(values), min(values), max(values))


@dataclasses.dataclass(frozen=True)
class StepCost:
    """Time of one kind of step.

    Args:
        seconds: Of a step.
        ratio: Over plain SGD's step.
        split: Seconds of its parts (see ``contender.StepTime``), which sum to ``seconds`` up to the medians.
    """

    seconds: Spread
    ratio: Spread
    split: dict[str, float]


@dataclasses.dataclass(frozen=True)
class TimeCost:
    """Time of one setting; kinds of steps that it does not take are ``None``.

    Args:
        plain: A step that applies the inverses at hand; of plain SGD, its only step.
        statistics: A step that also measures statistics, but leaves the inverses alone.
        refresh: A step that also measures statistics and inverts.
        amortised_ratio: Mean step of a refresh period, over plain SGD's step.
    """

    plain: StepCost | None
    statistics: StepCost | None
    refresh: StepCost | None
    amortised_ratio: Spread


@dataclasses.dataclass(frozen=True)
class Rounds:
    """How much is measured.

    Args:
        plain: Plain steps per setting; on CUDA, groups of them.
        refresh: Steps of each other kind per setting.
        repeats: Measurements of everything.
    """

    plain: int
    refresh: int
    repeats: int


def measure_costs(contenders: Mapping[str, Contender], rounds: Rounds, announcer: Announcer) -> list[TimeCost]:
    """Measure settings against the first one, which must be plain SGD.

    Args:
        contenders: Setting to contender.
        rounds: How much is measured.
        announcer: Told of every step.

    Returns:
        One cost per setting, in order.
    """
    for name, contender in contenders.items():
        announcer.show("warm-up", name)
        contender.warm_up()
    repeats = [_repeat(contenders, rounds, repeat, announcer) for repeat in range(1, rounds.repeats + 1)]
    baseline = [_median_seconds(times[0][StepKind.plain]) for times in repeats]
    return [
        _cost(contender.steps_per_period, [times[i] for times in repeats], baseline)
        for i, contender in enumerate(contenders.values())
    ]


def _repeat(contenders: Mapping[str, Contender], rounds: Rounds, repeat: int, announcer: Announcer) -> list[Times]:
    """Measure every kind of step of every setting once."""
    times: list[Times] = [{kind: [] for kind in contender.steps_per_period} for contender in contenders.values()]
    suffix = f" (repeat {repeat} of {rounds.repeats})" if rounds.repeats > 1 else ""
    for kind in StepKind:
        if not any(kind in own for own in times):
            continue
        count = rounds.plain if kind is StepKind.plain else rounds.refresh
        for number in range(1, count + 1):
            for (name, contender), own in zip(contenders.items(), times, strict=True):
                announcer.show(f"{kind} steps, round {number} of {count}{suffix}", name)
                _take_turn(contender, kind, own)
    return times


def _take_turn(contender: Contender, kind: StepKind, times: Times) -> None:
    """Take one step of this kind, if the setting has it; plain SGD takes part in every round."""
    if contender.preconditioner is None:
        kind = StepKind.plain
    if kind in times:
        times[kind].append(contender.timed_turn(kind))


def _cost(counts: Mapping[StepKind, int], repeats: Sequence[Times], baseline: Sequence[float]) -> TimeCost:
    steps = {kind: _step_cost([times[kind] for times in repeats], baseline) for kind in counts}
    amortised = [
        sum(counts[kind] * _median_seconds(times[kind]) for kind in counts) / sum(counts.values()) / plain_sgd
        for times, plain_sgd in zip(repeats, baseline, strict=True)
    ]
    return TimeCost(
        plain=steps.get(StepKind.plain),
        statistics=steps.get(StepKind.statistics),
        refresh=steps.get(StepKind.refresh),
        amortised_ratio=Spread.of(amortised),
    )


def _step_cost(repeats: Sequence[Sequence[StepTime]], baseline: Sequence[float]) -> StepCost:
    seconds = [_median_seconds(times) for times in repeats]
    has_replays = any(CAPTURED in time.split for times in repeats for time in times)
    return StepCost(
        seconds=Spread.of(seconds),
        ratio=Spread.of([own / plain_sgd for own, plain_sgd in zip(seconds, baseline, strict=True)]),
        split={
            phase: statistics.median(
                statistics.median(time.split.get(phase, 0.0) for time in times) for times in repeats
            )
            for phase in ((*PHASES, CAPTURED) if has_replays else PHASES)
        },
    )


def _median_seconds(times: Sequence[StepTime]) -> float:
    return statistics.median(time.seconds for time in times)
