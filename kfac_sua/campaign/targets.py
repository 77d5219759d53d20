"""When a method reaches the level of the baseline: mean curves, their first crossing of a target, and a table of these.

A curve is the mean over a method's finished seeds at each epoch, of the numbers and of the seconds alike. It is linear
between the ends of epochs, so that times to a target are not rounded to whole epochs.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from kfac_sua.campaign.bootstrap import RESAMPLES, interval, resampled_seeds
from kfac_sua.methods import BASELINE
from kfac_sua.runs.comparable import CIRCUMSTANCES, circumstances_of
from kfac_sua.runs.final_table import CollectError, require_one_precision

if TYPE_CHECKING:
    from numpy.typing import NDArray

TABLE_COLUMNS = (
    *("panel", "method", "target", "target_value"),
    *("epochs", "epochs_low", "epochs_high", "seconds", "seconds_low", "seconds_high", "seeds", "precision"),
    *CIRCUMSTANCES,
)

# Relative tolerance: rounding in a sum over seeds must not decide whether a target is reached exactly or never.
_ROUNDING = 1e-12


@dataclasses.dataclass(frozen=True)
class MeanCurve:
    """The mean over seeds of one method's runs, or of many resamples of them.

    Attributes:
        epochs: Epochs completed, ``[points]``; 0 is the untrained network.
        seconds: Training seconds since the start, ``[..., points]``.
        train_loss: Nats, ``[..., points]``.
        val_error: In [0, 1], ``[..., points]``.
        best_val_error: Mean over seeds of each seed's lowest error, ``[...]``. This is not the lowest point of the mean
            curve, which in a resample would be biased downwards.
    """

    epochs: "NDArray[np.float64]"
    seconds: "NDArray[np.float64]"
    train_loss: "NDArray[np.float64]"
    val_error: "NDArray[np.float64]"
    best_val_error: "NDArray[np.float64]"


@dataclasses.dataclass(frozen=True)
class Target:
    """A value that a curve has to come down to.

    Attributes:
        quantity: Which curve: ``val_error`` or ``train_loss``.
        value: The target, ``[...]``, from the baseline's mean curve.
    """

    quantity: str
    value: "Callable[[MeanCurve], NDArray[np.float64]]"

    def epochs(self, curve: MeanCurve, baseline: MeanCurve) -> "NDArray[np.float64]":
        """Return the epochs a curve needs, ``[...]``; infinity if it never reaches the target."""
        return _first_reach(curve.epochs, getattr(curve, self.quantity), self.value(baseline))

    def seconds(self, curve: MeanCurve, baseline: MeanCurve) -> "NDArray[np.float64]":
        """Return the training seconds a curve needs, ``[...]``; infinity if it never reaches the target."""
        return _first_reach(curve.seconds, getattr(curve, self.quantity), self.value(baseline))


# The lowest point of the baseline's mean curve; the mean of its seeds' lowest errors would be a level that the mean
# curve never reaches.
BEST_ERROR = Target("val_error", lambda baseline: baseline.val_error.min(axis=-1))
FINAL_LOSS = Target("train_loss", lambda baseline: baseline.train_loss[..., -1])
# The best of the first half; a single noisy epoch could set the value at half-time.
HALFWAY_ERROR = Target(
    "val_error", lambda baseline: baseline.val_error[..., baseline.epochs <= baseline.epochs[-1] / 2].min(axis=-1)
)

_TABLE_TARGETS: Mapping[str, Target] = {"val_error": BEST_ERROR, "train_loss": FINAL_LOSS}


def finished_runs(finals: pd.DataFrame, panel: str, method: str) -> pd.DataFrame:
    """Return the rows of a method's finished runs.

    Args:
        finals: Rows of ``collect_runs`` with ``panel`` and ``method``, one setting for each pair of these.
        panel: Name of the panel.
        method: Name of the method.

    Returns:
        Those rows; none if no run has finished.
    """
    return finals[(finals["panel"] == panel) & (finals["method"] == method) & (finals["status"] == "finished")]


def mean_curve(runs: pd.DataFrame) -> MeanCurve:
    """Return the mean over seeds, per epoch, over the epochs that all seeds have reached.

    Args:
        runs: Rows of ``collect_runs``: finished runs of one setting, one per seed.

    Returns:
        Arrays ``[points]``.

    Raises:
        CollectError: If there is no run, or there are several settings.
    """
    return _mean(_by_seed(runs))


def resampled_curves(runs: pd.DataFrame, resamples: int, key: str) -> MeanCurve:
    """Return the mean curve of every bootstrap resample of the seeds.

    Args:
        runs: As for ``mean_curve``.
        resamples: Number of resamples.
        key: See ``resampled_seeds``.

    Returns:
        Epochs ``[points]`` and arrays ``[resamples, points]``.

    Raises:
        CollectError: As ``mean_curve``.
    """
    curves = _by_seed(runs)
    seeds = resampled_seeds(len(curves.seconds), resamples, key)
    return _mean(_Seeds(curves.epochs, *(values[seeds] for values in curves.quantities)))


def first_reach(x: "NDArray[np.float64]", y: "NDArray[np.float64]", target: float) -> float:
    """Return where a piecewise linear curve is first at or below a target.

    Args:
        x: Epochs or seconds, increasing, ``[points]``.
        y: Finite values there, ``[points]``; they need not decrease.
        target: The level to come down to.

    Returns:
        The smallest such x, interpolated between points; infinity if there is none.
    """
    return float(_first_reach(x, y, np.asarray(target)))


def target_table(finals: pd.DataFrame, resamples: int = RESAMPLES) -> pd.DataFrame:
    """Return how long each method needs to reach what its panel's baseline reached.

    The targets are the lowest point of the baseline's mean validation error and the last of its mean training loss.
    Intervals are 95 % percentile bootstrap intervals over seeds, drawn per method independently; every resample
    recomputes the targets from its own baseline.

    Args:
        finals: Rows of ``collect_runs`` with ``panel`` and ``method``, one setting for each pair of these.
        resamples: Number of bootstrap resamples.

    Returns:
        ``TABLE_COLUMNS``, one row per panel, method and target, in the order of ``finals``. Infinity means never
        reached; an interval is NaN if the method or the baseline has a single finished seed. A panel without a
        finished baseline and a method without a finished run have no rows.

    Raises:
        CollectError: If a method has several settings, or the runs are of several precisions.
    """
    require_one_precision(finals)
    rows = [
        row
        for panel in finals["panel"].unique()
        if len(baseline := finished_runs(finals, panel, BASELINE))
        for method in finals.loc[finals["panel"] == panel, "method"].unique()
        if len(runs := finished_runs(finals, panel, method))
        for row in _rows(panel, method, runs, baseline, resamples)
    ]
    return pd.DataFrame(rows, columns=list(TABLE_COLUMNS))


def _rows(
    panel: str, method: str, runs: pd.DataFrame, baseline: pd.DataFrame, resamples: int
) -> list[dict[str, str | float]]:
    """Return the rows of one method."""
    curve, reference = mean_curve(runs), mean_curve(baseline)
    curves = resampled_curves(runs, resamples, f"{panel}/{method}")
    references = resampled_curves(baseline, resamples, f"{panel}/{BASELINE}")
    seeds = runs["seed"].nunique()
    has_spread = min(seeds, baseline["seed"].nunique()) > 1
    rows: list[dict[str, str | float]] = []
    for name, target in _TABLE_TARGETS.items():
        row: dict[str, str | float] = {"panel": panel, "method": method, "target": name}
        row["target_value"] = float(target.value(reference))
        for unit, needed in (("epochs", target.epochs), ("seconds", target.seconds)):
            low, high = interval(needed(curves, references)) if has_spread else (np.nan, np.nan)
            row |= {unit: float(needed(curve, reference)), f"{unit}_low": low, f"{unit}_high": high}
        rows.append(row | {"seeds": seeds, "precision": runs["precision"].iloc[0]} | circumstances_of(runs))
    return rows


@dataclasses.dataclass(frozen=True)
class _Seeds:
    """Single seeds: epochs ``[points]``; seconds, training losses and validation errors ``[..., seeds, points]``."""

    epochs: "NDArray[np.float64]"
    seconds: "NDArray[np.float64]"
    train_loss: "NDArray[np.float64]"
    val_error: "NDArray[np.float64]"

    @property
    def quantities(self) -> "tuple[NDArray[np.float64], ...]":
        return self.seconds, self.train_loss, self.val_error


def _by_seed(runs: pd.DataFrame) -> _Seeds:
    """Return the curves of the single seeds over the epochs that all have reached."""
    settings = runs["fingerprint"].nunique()
    if settings != 1:
        raise CollectError(f"A mean curve needs finished runs of one setting, got {settings}; keep the chosen one.")
    quantities = ["train_time_s", "train_loss", "val_error"]
    wide = runs.pivot(index="epoch", columns="seed", values=quantities).dropna()
    values = (wide[name].to_numpy(dtype=float).T for name in quantities)
    return _Seeds(wide.index.to_numpy(dtype=float), *values)


def _mean(seeds: _Seeds) -> MeanCurve:
    """Return the mean over seeds."""
    seconds, train_loss, val_error = (values.mean(axis=-2) for values in seeds.quantities)
    return MeanCurve(seeds.epochs, seconds, train_loss, val_error, seeds.val_error.min(axis=-1).mean(axis=-1))


def _first_reach(
    x: "NDArray[np.float64]", y: "NDArray[np.float64]", target: "NDArray[np.float64]"
) -> "NDArray[np.float64]":
    """Return ``first_reach`` of many curves: x ``[points]`` or as y, y ``[..., points]``, target ``[...]``."""
    is_reached = y <= (target + _ROUNDING * np.abs(target))[..., None]
    after = is_reached.argmax(axis=-1, keepdims=True)  # the first point at or below the target; 0 also if there is none
    before = np.maximum(after - 1, 0)
    positions = np.broadcast_to(x, y.shape)
    x_before, x_after = (np.take_along_axis(positions, index, -1)[..., 0] for index in (before, after))
    y_before, y_after = (np.take_along_axis(y, index, -1)[..., 0] for index in (before, after))
    drop = np.where(y_before > y_after, y_before - y_after, 1.0)  # 1 if the curve begins below: both points are one
    fraction = np.clip((y_before - target) / drop, 0.0, 1.0)
    return np.where(is_reached.any(axis=-1), x_before + fraction * (x_after - x_before), np.inf)
