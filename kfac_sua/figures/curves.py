"""Mean and range over seeds, against epochs and against training time."""

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from kfac_sua.runs.run_info import ENDED, UNENDED

if TYPE_CHECKING:
    from numpy.typing import NDArray


class FigureError(Exception):
    """A figure cannot be drawn from a table; the message is one sentence."""


@dataclasses.dataclass(frozen=True)
class Curve:
    """One line with its band: exactly the plotted numbers, each array ``[points]``.

    Attributes:
        x: Epochs or training seconds.
        mean: Mean over seeds.
        low: Lowest seed.
        high: Highest seed.
        seeds: Number of seeds in the mean.
    """

    x: "NDArray[np.float64]"
    mean: "NDArray[np.float64]"
    low: "NDArray[np.float64]"
    high: "NDArray[np.float64]"
    seeds: int


@dataclasses.dataclass(frozen=True)
class Method:
    """The curves of one method.

    Attributes:
        name: Name of the method.
        counts: Number of runs per status that occurs, in the order finished, diverged, running, failed.
        setting: Columns that the plotted runs have in common, for the CSV.
        loss: Training loss in nats against epochs.
        val_error: Validation error in percent against training seconds.
        train_error: Training misclassification, likewise.
    """

    name: str
    counts: dict[str, int]
    setting: dict[str, Any]
    loss: Curve
    val_error: Curve
    train_error: Curve

    @property
    def has_finished(self) -> bool:
        """Whether the curves come from finished runs; otherwise all runs that ended have diverged."""
        return "finished" in self.counts


def without_comparators(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the runs that the paper compares, and print which others are left out, which only a report draws.

    Args:
        frame: Rows of ``collect_runs``.
    """
    is_paper = (frame["optimizer"] == "sgd") & frame["batch_norm"]
    others = [*frame.loc[frame["optimizer"] != "sgd", "optimizer"].unique()]
    others += [] if frame["batch_norm"].all() else ["no batch normalisation"]
    if others:
        print(f"Left out: runs with {', '.join(others)}, which are no baseline of the paper.")
    return frame[is_paper]


def loss_curve(runs: pd.DataFrame) -> Curve:
    """Return the training loss per epoch, over the epochs that all seeds have reached.

    Args:
        runs: Rows of ``collect_runs`` of one setting, finite, one run per seed.

    Returns:
        Epochs against nats.
    """
    by_seed = runs.pivot(index="epoch", columns="seed", values="train_loss").dropna()
    return _curve(by_seed.index.to_numpy(dtype=float), by_seed.to_numpy(dtype=float))


def error_curve(runs: pd.DataFrame, column: str) -> Curve:
    """Return an error against training time.

    The error of every seed is interpolated linearly between the ends of its epochs, so that a mean is one of errors at
    the same time; a mean per epoch would mix errors of different times. The common grid is the union of the epoch
    ends of all seeds, where the mean of the interpolated curves has its corners, within the interval that all seeds
    cover. Nothing is extrapolated.

    Args:
        runs: Rows of ``collect_runs`` of one setting, finite, one run per seed.
        column: ``val_error`` or ``train_error``.

    Returns:
        Seconds against percent; empty if no time is covered by all seeds.
    """
    seeds = [run.sort_values("epoch") for _, run in runs.groupby("seed")]
    times = [run["train_time_s"].to_numpy(dtype=float) for run in seeds]
    errors = [100 * run[column].to_numpy(dtype=float) for run in seeds]
    if not seeds:
        return _curve(np.empty(0), np.empty((0, 0)))
    grid = np.unique(np.concatenate(times))
    grid = grid[(grid >= max(time[0] for time in times)) & (grid <= min(time[-1] for time in times))]
    columns = [np.interp(grid, time, error) for time, error in zip(times, errors, strict=True)]
    return _curve(grid, np.stack(columns, axis=1))  # [points, seeds]


def method_curves(name: str, rows: pd.DataFrame) -> Method:
    """Return the curves of a method: of its finished runs or, if there are none, of the diverged ones.

    Args:
        name: Name of the method.
        rows: Its rows of ``collect_runs``, all of one setting.

    Raises:
        FigureError: If there are several settings, no run has ended, or no training time is covered by all finished
            seeds.
    """
    settings = rows["fingerprint"].nunique()
    if settings != 1:
        raise FigureError(f"Method {name!r} has {settings} settings; keep one, for example by select_best.")
    numbers = rows.drop_duplicates("run")["status"].value_counts()
    counts: dict[str, int] = {status: int(numbers[status]) for status in (*ENDED, *UNENDED) if status in numbers}
    if not counts.keys() & set(ENDED):
        raise FigureError(f"No run of method {name!r} has ended; let them finish, or leave the method out.")
    runs = rows[rows["status"] == next(iter(counts))]
    keys = ("dataset", "model", "base_lr", "damping", "precision", "fingerprint", "status")
    setting = {key: runs[key].iloc[0] for key in keys}
    finite = _common_finite_epochs(runs)
    errors = [error_curve(finite, column) for column in ("val_error", "train_error")]
    method = Method(name, counts, setting, loss_curve(finite), *errors)
    if method.has_finished and not len(method.val_error.x):
        raise FigureError(
            f"No training time is covered by all seeds of {name!r}, so their errors cannot be averaged;"
            " run more epochs, on the same device for all seeds."
        )
    return method


def _common_finite_epochs(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the rows up to the last epoch that every run has reached without a non-finite number."""
    measured = runs[["train_loss", "train_error", "val_error", "train_time_s"]].to_numpy(dtype=float)
    is_finite = pd.Series(np.isfinite(measured).all(axis=1), index=runs.index)
    intact = is_finite.groupby(runs["run"]).cummin().astype(bool)
    last_epochs = runs["epoch"].where(intact, 0).groupby(runs["run"]).max()
    return runs[intact & (runs["epoch"] <= last_epochs.min())]


def _curve(x: "NDArray[np.float64]", by_seed: "NDArray[np.float64]") -> Curve:
    """Return mean and range over the columns of ``[points, seeds]``."""
    if not by_seed.size:
        nothing = np.empty(0)
        return Curve(nothing, nothing, nothing, nothing, seeds=0)
    return Curve(x, by_seed.mean(axis=1), by_seed.min(axis=1), by_seed.max(axis=1), by_seed.shape[1])
