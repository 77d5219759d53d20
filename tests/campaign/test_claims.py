"""Verdicts on hand-made runs whose outcome is known."""

import math

import numpy as np
import pandas as pd
import pytest

from kfac_sua.campaign.claims import CLAIMS
from kfac_sua.campaign.judge import judge
from kfac_sua.runs.final_table import CollectError

EPOCHS = np.arange(11)


def _rows(panel, method, seed, loss, error, seconds, status="finished"):
    """Return the rows of one run."""
    values = {
        "panel": panel,
        "method": method,
        "run": f"{panel}/{method}/{seed}",
        "fingerprint": method,
        "precision": "float32",
        "seed": seed,
        "status": status,
        "epoch": EPOCHS[: len(loss)],
        "train_loss": loss,
        "val_error": error,
        "train_time_s": seconds * EPOCHS[: len(loss)],
    }
    return pd.DataFrame(values)


def _method(panel, method, rate, best, seconds, seeds=3):
    """Return runs whose curves are straight lines over ten epochs.

    The loss falls from 2 by rate/10 per epoch and the error from 0.8 to ``best``. Each is one number for all seeds or
    one per seed.
    """
    rates, bests = np.broadcast_to(rate, seeds), np.broadcast_to(best, seeds)
    runs = [
        _rows(panel, method, seed, 2 - rates[seed] * EPOCHS / 10, 0.8 - (0.8 - bests[seed]) * EPOCHS / 10, seconds)
        for seed in range(seeds)
    ]
    return pd.concat(runs)


def _finals(panel, methods, seeds=3):
    """Return the final runs of methods given as (rate, best, seconds per epoch)."""
    return pd.concat([_method(panel, name, *numbers, seeds) for name, numbers in methods.items()], ignore_index=True)


# The baseline ends after 10 epochs and 10 seconds at loss 1 and error 0.4, and is at error 0.6 halfway.
BASELINE = {"baseline": (1.0, 0.4, 1.0)}
FIG1 = BASELINE | {
    "kfac": (1.6, 0.30, 1.2),
    "sua": (1.5, 0.32, 0.75),
    "grouped": (1.4, 0.304, 1.0),
    "sua_grouped": (1.3, 0.31, 0.7),
}
LEFT = BASELINE | {"sua_grouped": (1.5, 0.3, 1.1)}
DECAY = BASELINE | {"sua_grouped": (1.5, 0.395, 0.9)}
HOLDING = {"C1": FIG1, "C2": FIG1, "C3": FIG1, "C4": LEFT, "C5": DECAY, "C6": DECAY}
SPREAD = np.array([-1.0, 0.0, 1.0])
NEVER, NO_VALUE = math.inf, math.nan
# What C5 and C6 come to: final error, seconds to the loss, seconds to the error of the first half.
DECAY_CASES = [
    ({}, "holds", [-0.5, 0.6, 9 / 10 * 2 / 0.405 / 5]),
    ({"sua_grouped": (1.5, 0.42, 0.9)}, "holds", [2, 0.6, 0.9 * 2 / 0.38 / 5]),
    ({"sua_grouped": (1.5, 0.3, 0.9)}, "does not hold", [-10, 0.6, 0.9 * 4 / 5]),
    ({"sua_grouped": (1.5, 0.395, 1.8)}, "does not hold", [-0.5, 1.2, 1.8 * 2 / 0.405 / 5]),
    ({"sua_grouped": (1.5, 0.65, 0.9)}, "does not hold", [25, 0.6, NEVER]),
    ({"sua_grouped": (1.5, 0.395 + 0.02 * SPREAD, 0.9)}, "undecided", [-0.5, 0.6, 0.9 * 2 / 0.405 / 5]),
]
CASES = [
    ("C1", {}, "holds", [1.6 / 1.5]),
    ("C1", {"sua": (1.7, 0.3, 1)}, "holds", [1.6 / 1.7]),
    ("C1", {"sua": (1.25, 0.3, 1)}, "does not hold", [1.28]),
    ("C1", {"sua": (1.4 + 0.2 * SPREAD, 0.3, 1)}, "undecided", [1.6 / 1.4]),
    ("C1", {"sua": (0.9, 0.3, 1)}, "does not hold", [NEVER]),
    ("C1", {"kfac": (0.9, 0.3, 1)}, "holds", [0]),
    ("C1", {"sua": (0.9, 0.3, 1), "kfac": (0.8, 0.3, 1)}, "undecided", [NO_VALUE]),
    # Seconds per epoch, then to error 0.4: K-FAC 8 epochs in 9.6 s, SUA 8.33 epochs in 6.25 s.
    ("C2", {}, "holds", [1.6, 6.25 / 9.6, 0.625, 0.96]),
    ("C2", {"kfac": (1.6, 0.3, 1.0)}, "does not hold", [4 / 3, 6.25 / 8, 0.625, 0.8]),
    ("C2", {"kfac": (1.6, 0.3, 1.3)}, "does not hold", [1.3 / 0.75, 6.25 / 10.4, 0.625, 1.04]),
    ("C2", {"kfac": (1.6, 0.45, 1.2)}, "does not hold", [1.6, 0, 0.625, NEVER]),
    ("C2", {"sua": (1.5, 0.32 + 0.1 * SPREAD, 0.75)}, "undecided", [1.6, 6.25 / 9.6, 0.625, 0.96]),
    # Undecided in one part, but refuted by another.
    (
        "C2",
        {"sua": (1.5, 0.32 + 0.1 * SPREAD, 0.75), "kfac": (1.6, 0.3, 1.0)},
        "does not hold",
        [4 / 3, 6.25 / 8, 0.625, 0.8],
    ),
    ("C3", {}, "holds", [1.6 / 1.4, 1.5 / 1.3, 0.4, -1]),
    ("C3", {"grouped": (1.7, 0.304, 1)}, "holds", [1.6 / 1.7, 1.5 / 1.3, 0.4, -1]),
    ("C3", {"grouped": (1.1, 0.304, 1)}, "does not hold", [1.6 / 1.1, 1.5 / 1.3, 0.4, -1]),
    ("C3", {"sua_grouped": (1.3, 0.33, 1)}, "does not hold", [1.6 / 1.4, 1.5 / 1.3, 0.4, 1]),
    ("C3", {"sua_grouped": (1.3, 0.32 + 0.02 * SPREAD, 1)}, "undecided", [1.6 / 1.4, 1.5 / 1.3, 0.4, 0]),
    ("C4", {}, "holds", [1.1 / 1.5, 0.88, 0.5, -10]),
    ("C4", {"sua_grouped": (1.5, 0.3, 1.4)}, "does not hold", [1.4 / 1.5, 1.12, 0.5, -10]),
    ("C4", {"sua_grouped": (1.5, 0.41, 1.1)}, "does not hold", [1.1 / 1.5, NEVER, 0.5, 1]),
    ("C4", {"sua_grouped": (0.9, 0.3, 1.1)}, "does not hold", [NEVER, 0.88, 1.1, -10]),
    ("C4", {"sua_grouped": (1.5, 0.3 + 0.15 * SPREAD, 1.1)}, "undecided", [1.1 / 1.5, 0.88, 0.5, -10]),
    ("C4", {"sua_grouped": BASELINE["baseline"]}, "undecided", [1, 1, 1, 0]),  # ties
    *(("C5", *case) for case in DECAY_CASES),
    *(("C6", *case) for case in DECAY_CASES),
]


def _panel_finals(claim, changes=None, seeds=3):
    """Return final runs for which a claim holds, apart from these methods."""
    return _finals(CLAIMS[claim].panel, HOLDING[claim] | (changes or {}), seeds)


@pytest.mark.parametrize(("claim", "changes", "outcome", "values"), CASES)
def test_verdict(claim, changes, outcome, values):
    """The outcome and the deciding numbers are those computed by hand."""
    verdict = judge(claim, _panel_finals(claim, changes))
    assert [part.value for part in verdict.parts] == pytest.approx(values, abs=1e-9, nan_ok=True)
    assert verdict.outcome == outcome
    assert (verdict.claim, verdict.seeds) == (claim, 3)


@pytest.mark.parametrize("claim", CLAIMS)
def test_claims_about_seconds_are_judged_in_one_precision(claim):
    """A faster arithmetic is no faster method: such a claim is refused, one about epochs is judged as before."""
    finals = _panel_finals(claim)
    method = CLAIMS[claim].criteria[0].first
    mixed = finals.assign(precision=np.where(finals["method"] == method, "tf32", "float32"))
    if CLAIMS[claim].is_timed:
        with pytest.raises(CollectError, match=rf"\(float32: baseline.*; tf32: {method}\); give the runs of one"):
            judge(claim, mixed)
    else:
        assert judge(claim, mixed) == judge(claim, finals)
    assert judge(claim, finals.assign(precision="tf32")) == judge(claim, finals)


def test_precisions_of_methods_that_a_claim_does_not_name_are_no_matter():
    """C2 compares baseline, K-FAC and SUA, in one panel."""
    finals = _panel_finals("C2")
    other = finals["method"].isin(["grouped", "sua_grouped"])
    elsewhere = finals[finals["method"] == "sua"].assign(panel="other", precision="tf32")
    mixed = pd.concat([finals.assign(precision=np.where(other, "tf32", "float32")), elsewhere])
    assert judge("C2", mixed) == judge("C2", finals)


def test_every_claim_has_all_three_outcomes_above():
    """A new claim needs cases too."""
    assert {(case[0], case[2]) for case in CASES} == {
        (claim, outcome) for claim in CLAIMS for outcome in ("holds", "does not hold", "undecided")
    }


def test_a_part_states_its_comparison_its_interval_and_its_threshold():
    """The interval of three seeds runs from the fastest to the slowest of them."""
    (part,) = judge("C1", _panel_finals("C1", {"sua": (1.4 + 0.2 * SPREAD, 0.3, 1)})).parts
    assert part.text == "Epochs to the baseline's final training loss, SUA / K-FAC"
    assert (part.low, part.high) == pytest.approx((1.6 / 1.6, 1.6 / 1.2))
    assert (part.threshold, part.outcome) == ("< 1.25", "undecided")
    points = judge("C3", _panel_finals("C3")).parts[2]
    assert points.text == "Best validation error, K-FAC in groups − K-FAC"
    assert (points.threshold, points.outcome) == ("< 0.5 points", "holds")


def test_an_interval_up_to_infinity_is_undecided():
    """Some seeds never reach the target, their mean does."""
    part = judge("C2", _panel_finals("C2", {"sua": (1.5, 0.32 + 0.1 * SPREAD, 0.75)})).parts[2]
    assert (part.value, part.high, part.outcome) == (pytest.approx(0.625), math.inf, "undecided")
    assert part.low == pytest.approx(0.75 * 10 * 0.4 / 0.58 / 10)


def test_an_interval_that_touches_the_threshold_is_undecided():
    """Epochs 5 and 4 are a ratio of exactly 1.25, which is neither below nor above."""
    error = np.full(6, 0.5)
    losses = {"baseline": [6, 5, 4, 3, 2, 1], "kfac": [6, 5, 4, 3, 1, 1], "sua": [6, 5, 4, 3, 2, 1]}
    runs = [_rows("vgg11", name, seed, loss, error, 1) for name, loss in losses.items() for seed in range(3)]
    (part,) = judge("C1", pd.concat(runs)).parts
    assert (part.value, part.low, part.high, part.outcome) == (1.25, 1.25, 1.25, "undecided")


def test_neither_reaching_the_target_is_explained():
    """Infinity over infinity is no number; the note says of which part and why."""
    verdict = judge("C1", _panel_finals("C1", {"sua": (0.9, 0.3, 1), "kfac": (0.8, 0.3, 1)}))
    assert verdict.parts[0].outcome == "undecided"
    assert verdict.note == f"{verdict.parts[0].text}: no value, as neither reaches the target or both start below it."


def test_a_baseline_that_never_improves_decides_nothing_about_time():
    """Its best error is that of the untrained network, which all have at zero seconds."""
    verdict = judge("C4", _panel_finals("C4", {"baseline": (1.0, 0.9, 1.0)}))
    assert math.isnan(verdict.parts[1].value)
    assert verdict.parts[1].outcome == "undecided"
    assert verdict.outcome == "undecided"
    assert verdict.note.startswith(
        "Seconds to the baseline's best validation error, SUA in groups / baseline: no value"
    )


@pytest.mark.parametrize(
    ("first_half", "epoch"),
    [
        pytest.param([0.8, 0.7, 0.6, 0.5, 0.7, 0.7], 3, id="a dip before half-time and not the bad epoch at half-time"),
        pytest.param([0.8, 0.7, 0.6, 0.6, 0.6, 0.5], 5, id="half-time itself"),
    ],
)
def test_halfway_is_the_best_error_of_the_first_half(first_half, epoch):
    """Whatever comes later, the target is the lowest error until then, which the baseline has at that epoch."""
    error = np.array([*first_half, 0.3, 0.4, 0.4, 0.4, 0.4])
    baseline = [_rows("middle", "baseline", seed, 2 - EPOCHS / 10, error, 1.0) for seed in range(3)]
    sua = _method("middle", "sua_grouped", 1.5, 0.395, 0.3)  # at 0.5 after 0.3 / 0.0405 epochs of 0.3 seconds
    part = judge("C5", pd.concat([*baseline, sua])).parts[2]
    assert part.value == pytest.approx(0.3 * 0.3 / 0.0405 / epoch)


def test_ties_leave_every_part_of_beating_the_baseline_undecided():
    """Equal is not better, and not worse either."""
    parts = judge("C4", _panel_finals("C4", {"sua_grouped": BASELINE["baseline"]})).parts
    assert [(part.low, part.high) for part in parts] == [(1, 1), (1, 1), (1, 1), (0, 0)]
    assert {part.outcome for part in parts} == {"undecided"}


def test_methods_are_resampled_independently():
    """Equal runs of two methods do not cancel: their seeds' spread shows in the interval of the ratio."""
    spread = 1.6 + 0.3 * SPREAD
    (part,) = judge("C1", _panel_finals("C1", {"sua": (spread, 0.3, 1), "kfac": (spread, 0.3, 1)})).parts
    assert part.value == 1
    assert part.low < 0.9
    assert part.high > 1.1


@pytest.mark.parametrize("claim", CLAIMS)
def test_a_single_seed_decides_nothing(claim):
    """The numbers are given, without intervals, and the note says of whom."""
    several = judge(claim, _panel_finals(claim))
    verdict = judge(claim, _panel_finals(claim, seeds=1))
    assert (several.outcome, verdict.outcome, verdict.seeds) == ("holds", "undecided", 1)
    assert [part.value for part in verdict.parts] == pytest.approx([part.value for part in several.parts])
    assert all(math.isnan(part.low) and math.isnan(part.high) for part in verdict.parts)
    assert {part.outcome for part in verdict.parts} == {"undecided"}
    assert verdict.note.split(". ")[0].rstrip(".") == f"{CLAIMS[claim].methods[0]}: one finished seed, so no interval"
    assert verdict.note.count("one finished seed") == len(CLAIMS[claim].methods)


@pytest.mark.parametrize(("claim", "method"), [(name, method) for name in CLAIMS for method in CLAIMS[name].methods])
def test_a_missing_method_is_named(claim, method):
    """Without one of its methods, the baseline included, a claim is undecided."""
    finals = _panel_finals(claim)
    verdict = judge(claim, finals[finals["method"] != method])
    assert (verdict.outcome, verdict.seeds, verdict.note) == ("undecided", 0, f"No finished run of {method}.")


def test_parts_that_do_not_need_the_missing_method_are_still_given():
    """A refuted part does not decide a claim that could not be looked at as a whole."""
    finals = _panel_finals("C3", {"sua_grouped": (1.3, 0.33, 1)})
    verdict = judge("C3", finals[finals["method"] != "grouped"])
    assert [part.outcome for part in verdict.parts] == ["undecided", "holds", "undecided", "does not hold"]
    assert math.isnan(verdict.parts[0].value)
    assert verdict.outcome == "undecided"


def test_another_panel_does_not_stand_in():
    """C5 is decided in the middle panel, on nothing else."""
    verdict = judge("C5", _finals("right", DECAY))
    assert verdict.note == "No finished run of sua_grouped. No finished run of baseline."


def test_diverged_and_running_seeds_are_counted_and_left_out():
    """The verdict is that of the finished seeds."""
    finals = _panel_finals("C1", {"sua": (1.4 + 0.1 * SPREAD, 0.3, 1)})
    others = [
        _rows("vgg11", "sua", 7, [2.0, math.nan], [0.8, math.nan], 1, "diverged"),
        _rows("vgg11", "sua", 8, [2.0, 9.0], [0.8, 0.9], 1, "running"),
        _rows("vgg11", "sua", 9, [2.0, 9.0], [0.8, 0.9], 1, "failed"),
        _rows("vgg11", "kfac", 7, [math.nan], [math.nan], 1, "diverged"),
    ]
    verdict = judge("C1", pd.concat([finals, *others]))
    assert verdict.parts == judge("C1", finals).parts
    assert verdict.seeds == 3
    assert verdict.note == (
        "sua: of 6 seeds 1 diverged and 1 failed and 1 still running, left out of its mean."
        " kfac: of 4 seeds 1 diverged, left out of its mean."
    )


def test_a_method_all_of_whose_seeds_diverged_is_undecided():
    """There is no curve to judge, and the note says why."""
    finals = _panel_finals("C1")
    diverged = finals.assign(status=finals["status"].mask(finals["method"] == "sua", "diverged"))
    verdict = judge("C1", diverged)
    assert (verdict.outcome, verdict.seeds) == ("undecided", 0)
    assert verdict.note == "No finished run of sua (of 3 seeds 3 diverged)."


def test_comparators_do_not_change_a_verdict():
    """Methods that a claim does not mention are not looked at."""
    finals = _panel_finals("C2", {"sua": (1.5, 0.32 + 0.1 * SPREAD, 0.75)})
    verdict = judge("C2", finals)
    assert judge("C2", pd.concat([_method("vgg11", "adamw", 1.9, 0.1, 0.1), finals])) == verdict


def test_unknown_claims_and_mixed_settings_are_errors():
    """The message lists the claims; runs of two settings are not averaged."""
    finals = _panel_finals("C1")
    with pytest.raises(ValueError, match="no claim 'C7'; known are C1, C2, C3, C4, C5, C6"):
        judge("C7", finals)
    mixed = finals.assign(fingerprint=[f"{seed % 2}" for seed in finals["seed"]])
    with pytest.raises(CollectError, match="one setting, got 2"):
        judge("C1", mixed)


def test_best_validation_error_is_the_mean_of_each_seeds_own():
    """Seeds that dip in different epochs: each counts with its lowest, as in the table of final numbers."""
    finals = _finals("vgg11", FIG1)
    grouped = finals["method"] == "grouped"
    for seed, epoch in enumerate((8, 9, 10)):
        finals.loc[grouped & (finals["seed"] == seed) & (finals["epoch"] == epoch), "val_error"] = 0.25
    part = judge("C3", finals).parts[2]
    assert part.value == pytest.approx(100 * (0.25 - 0.30))
    assert (part.low, part.high) == pytest.approx((-5, -5))
