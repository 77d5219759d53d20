"""Seconds of steps become ratios and amortised costs as stated."""

import pytest
from bench_runs import tiny_contenders

from kfac_sua.bench.contender import PHASES, StepTime
from kfac_sua.bench.costs import Rounds, measure_costs
from kfac_sua.bench.progress import Announcer
from kfac_sua.bench.step_kinds import StepKind


class ScriptedContender:
    """Takes steps of given seconds; in the second repeat, all take longer by a factor of its own."""

    def __init__(self, counts: dict[StepKind, int], seconds: dict[StepKind, float], slowdown: float) -> None:
        self.preconditioner = None if len(counts) == 1 else object()
        self.steps_per_period = counts
        self._seconds, self._slowdown = seconds, slowdown
        self._kind, self._taken = StepKind.plain, 0
        self._steps_of_warm_up_and_first_repeat = 0

    def starts_second_repeat_after(self, num_steps: int) -> "ScriptedContender":
        """Slow down after so many steps, those of the warm-up included."""
        self._steps_of_warm_up_and_first_repeat = num_steps
        return self

    def warm_up(self) -> None:
        """Take two steps."""
        self._taken += 2

    def timed_turn(self, kind: StepKind) -> StepTime:
        """Say how long the step took."""
        self._kind = kind
        self._taken += 1
        is_slow = self._taken > self._steps_of_warm_up_and_first_repeat
        seconds = self._seconds[self._kind] * (self._slowdown if is_slow else 1)
        return StepTime(seconds, dict.fromkeys(PHASES, seconds / len(PHASES)))


def test_amortised_ratio_is_the_mean_over_a_period():
    """One refresh, 9 statistics and 40 plain steps of 10, 4 and 2 s over steps of 1 s; then of 20, 8 and 4 over 4 s."""
    counts = {StepKind.plain: 40, StepKind.statistics: 9, StepKind.refresh: 1}
    seconds = {StepKind.plain: 2.0, StepKind.statistics: 4.0, StepKind.refresh: 10.0}
    contenders = {  # plain SGD takes part in the 3 + 1 + 1 rounds of every repeat
        "baseline": ScriptedContender({StepKind.plain: 1}, {StepKind.plain: 1.0}, 4.0).starts_second_repeat_after(7),
        "own": ScriptedContender(counts, seconds, 2.0).starts_second_repeat_after(7),
    }
    baseline, own = measure_costs(contenders, Rounds(plain=3, refresh=1, repeats=2), Announcer())
    first = (40 * 2 + 9 * 4 + 10) / 50
    assert (own.amortised_ratio.low, own.amortised_ratio.high) == pytest.approx((first / 2, first))
    assert own.amortised_ratio.median == pytest.approx(0.75 * first)
    assert (own.plain.seconds.low, own.plain.seconds.high) == (2.0, 4.0)
    assert (own.refresh.ratio.low, own.refresh.ratio.high) == (5.0, 10.0)
    assert sum(own.statistics.split.values()) == pytest.approx(own.statistics.seconds.median)
    assert (baseline.amortised_ratio.low, baseline.amortised_ratio.high) == (1.0, 1.0)
    assert baseline.refresh is None
    assert baseline.statistics is None


@pytest.mark.parametrize(
    ("keys", "counts"),
    [
        ("inverse_period=50", {StepKind.plain: 49, StepKind.refresh: 1}),
        ("inverse_period=1", {StepKind.refresh: 1}),
        (
            "inverse_period=6,factor_period=2,ema_decay=0.9",
            {StepKind.plain: 3, StepKind.statistics: 2, StepKind.refresh: 1},
        ),
        ("inverse_period=6,factor_period=1,ema_decay=0.9", {StepKind.statistics: 5, StepKind.refresh: 1}),
    ],
)
def test_steps_are_of_the_kind_that_is_due(keys, counts):
    """A refresh period has the stated steps, and each does what its kind says, in any order."""
    contender = tiny_contenders(f"sua:{keys}")[f"sua:{keys}"]
    assert contender.steps_per_period == counts
    contender.timed_step()
    for kind in [*counts, *reversed(counts), *counts]:
        contender.make_due(kind)
        split = contender.timed_step().split
        assert (split["statistics"] > 0) == (kind is not StepKind.plain)
        assert (split["inversion"] > 0) == (kind is StepKind.refresh)
        assert split["application"] > 0


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float64"])
def test_the_parts_of_a_step_sum_to_it(precision):
    """Every part lies within the step, and next to nothing of the step outside every part."""
    for contender in tiny_contenders("kfac", precision=precision).values():
        for _ in range(2):  # a refresh and a plain step
            time = contender.timed_step()
            assert 0.7 * time.seconds < sum(time.split.values()) <= time.seconds + 1e-9
