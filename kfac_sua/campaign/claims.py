"""The paper's claims, each a conjunction of criteria: one number of mean curves against a threshold.

The paper gives neither numbers nor spreads, so its words ("almost", "slightly", "far cheaper") are margins fixed here,
before the final runs that they judge were made.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Literal

import numpy as np

from kfac_sua.campaign.targets import BEST_ERROR, FINAL_LOSS, HALFWAY_ERROR, MeanCurve
from kfac_sua.methods import BASELINE, METHODS

if TYPE_CHECKING:
    from numpy.typing import NDArray

Curves = Mapping[str, MeanCurve]

# "Almost as well", "slightly worse": at most a quarter more epochs, which is little against a preconditioner that
# halves them.
ALMOST = 1.25
# "Far cheaper": a ratio of 1.5 is beyond noise. It is small beside the operations saved (inverting a factor that is 9
# times as wide takes 9³ = 729 times as many), because both methods pay for the forward and backward pass.
FAR_CHEAPER = 1.5
# "The same or better" validation error: half a point, the standard error of an error of 15 % on 5,000 held-out images.
SAME_ERROR_POINTS = 0.5
# "Catches up": the baseline ends less than a point, two such standard errors, behind.
CAUGHT_UP_POINTS = 1.0


@dataclasses.dataclass(frozen=True)
class Measure:
    """One number of a method, and how two methods are compared by it.

    Attributes:
        words: What is measured.
        of: Maps the curves of a method and of the baseline, ``[..., points]``, to the number, ``[...]``.
        comparison: ``ratio``, or ``points`` for the difference of two errors in percentage points.
        is_timed: Whether it needs seconds that can be compared, from runs that are alone on their device.
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
        second: Name of the method by which it is divided, or which is subtracted from it.
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
