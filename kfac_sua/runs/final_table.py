"""The table of many runs, summarised per setting, and the best setting of a grid.

A *setting* is everything in the configuration but the seed; runs of one setting share a fingerprint.
"""

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd

from kfac_sua.methods import METHODS
from kfac_sua.runs.run_info import ENDED, UNENDED

SETTING_COLUMNS = (
    *("dataset", "model", "width", "batch_norm", "preconditioner", "optimizer", "schedule"),
    *("base_lr", "damping", "group_size", "precision", "fingerprint"),
)
QUANTITIES = (
    "epochs",
    "train_loss",
    "train_eval_loss",
    "best_val_error",
    "final_val_error",
    "test_error",
    "seconds_per_epoch",
)


class CollectError(Exception):
    """Runs that are missing or do not fit together; the message is one sentence."""


def require_runs(frame: pd.DataFrame, names: Sequence[str]) -> None:
    """Check that every preconditioner has a run that has ended, by finishing or by diverging.

    Args:
        frame: Result of ``collect_runs``.
        names: Names of preconditioners, such as ``kfac``.

    Raises:
        CollectError: If one has none; the message names all that have none.
    """
    ended = set(frame.loc[frame["status"].isin(ENDED), "preconditioner"])
    missing = [name for name in names if name not in ended]
    if missing:
        runs = frame[frame["preconditioner"].isin(missing)]
        unended = {status: sorted(set(runs.loc[runs["status"] == status, "preconditioner"])) for status in UNENDED}
        words = {"running": "still marked as running", "failed": "failed"}
        notes = [f"{', '.join(unended[status])} {words[status]}" for status in UNENDED if unended[status]]
        note = f" ({'; '.join(notes)})" if notes else ""
        raise CollectError(
            f"Of {len(names)} preconditioners needed, {len(missing)} have no finished run:"
            f" {', '.join(missing)}{note}; start the missing runs, the same command resumes an interrupted one."
        )


def require_one_precision(frame: pd.DataFrame) -> None:
    """Check that all runs computed in the same precision, as otherwise their seconds cannot be compared.

    Args:
        frame: Rows of ``collect_runs``, or any table with its ``precision``. An older table without this column counts
            as one unknown precision, which differs from all others.

    Raises:
        CollectError: If there are several precisions; the message names each, with its methods.
    """
    names = frame["method"] if "method" in frame else frame["preconditioner"]
    precisions = pd.Series(frame.get("precision"), index=frame.index, dtype=object).fillna("not recorded")
    methods = names.groupby(precisions).unique()
    if len(methods) > 1:
        found = "; ".join(f"{precision}: {', '.join(methods[precision])}" for precision in methods.index)
        raise CollectError(
            f"Seconds of runs in {len(methods)} precisions cannot be compared ({found}); give the runs of one of these,"
            " or train all with the same, such as precision=float32."
        )


def final_table(frame: pd.DataFrame) -> pd.DataFrame:
    """Return one row per setting: how many runs have each status, and the results of the finished ones.

    Args:
        frame: Result of ``collect_runs``.

    Returns:
        ``SETTING_COLUMNS``, the counts ``finished``, ``diverged``, ``running`` and ``failed``, ``seeds`` as text, then
        ``<name>_mean`` and ``<name>_std`` for each name in ``QUANTITIES``, over the finished seeds. The mean is NaN
        without a finished seed, the sample standard deviation with fewer than two. Losses and ``final_val_error`` are
        those of the last epoch. Rows are in the order of the figures' curves.
    """
    setting = [name for name in SETTING_COLUMNS if name in frame]  # older tables have fewer
    summaries = pd.DataFrame([_summary(run, setting) for _, run in frame.groupby("run", sort=False)])
    # dropna=False keeps the baseline, whose damping is NaN.
    counts = summaries.groupby([*setting, "status"], dropna=False).size().unstack("status", fill_value=0)
    counts = counts.reindex(columns=[*ENDED, *UNENDED], fill_value=0)
    is_finished = summaries["status"] == "finished"
    measured = summaries[setting].join(summaries[list(QUANTITIES)].astype(float).where(is_finished))
    numbers = measured.groupby(setting, dropna=False).agg(["mean", "std"])
    numbers.columns = numbers.columns.map("_".join)
    seeds = summaries.groupby(setting, dropna=False)["seed"].agg(_seeds_text)
    table = counts.join(seeds.rename("seeds")).join(numbers).reset_index().rename_axis(columns=None)
    return table.sort_values(setting, key=_in_order_of_figures, kind="stable", ignore_index=True)


def _summary(run: pd.DataFrame, setting: Sequence[str]) -> dict[str, Any]:
    """Return the setting, the status and the quantities of one run, whose rows are its epochs in order."""
    last = run.iloc[-1]
    kept = (*setting, "seed", "status", "train_loss", "train_eval_loss", "test_error")
    return {name: last[name] for name in kept} | {
        "epochs": last["epoch"],
        "best_val_error": run["val_error"].min(),
        "final_val_error": last["val_error"],
        "seconds_per_epoch": last["train_time_s"] / last["epoch"] if last["epoch"] else math.nan,
    }


def _seeds_text(seeds: "pd.Series[int]") -> str:
    """Return seeds as ``0``, ``0, 1``, or ``0 to 4`` for three or more consecutive ones."""
    values = sorted(seeds)
    is_range = len(values) > 2 and values == list(range(values[0], values[-1] + 1))
    return f"{values[0]} to {values[-1]}" if is_range else ", ".join(map(str, values))


def _in_order_of_figures(column: "pd.Series[Any]") -> "pd.Series[Any]":
    """Return sort keys: methods in the order of the figures, other columns by value."""
    if column.name != "preconditioner":
        return column
    order = {name: position for position, name in enumerate(METHODS)}
    return column.map(lambda name: order.get(name, len(order)))


def select_best(frame: pd.DataFrame, by: str = "best_val_error") -> pd.DataFrame:
    """Keep, per data set, model and preconditioner, the runs of the best setting of a grid.

    The paper reports "the best performing curves" without a criterion. Here the criterion is the lowest mean over seeds
    on the held-out split, never the test set. Settings with a diverged seed rank after all others. A setting is no
    candidate if none of its runs has ended.

    Args:
        frame: Result of ``collect_runs``.
        by: The quantity to minimise, one of ``QUANTITIES``.

    Returns:
        The rows of ``frame`` that belong to the chosen settings.

    Raises:
        CollectError: If ``by`` is in seconds, and runs have several precisions.
    """
    if by == "seconds_per_epoch":
        require_one_precision(frame)
    ended = final_table(frame[frame["status"].isin(ENDED)])
    ranked = ended.sort_values(["diverged", f"{by}_mean", "train_loss_mean"], kind="stable")
    best = ranked.drop_duplicates(["dataset", "model", "preconditioner"])
    return frame[frame["fingerprint"].isin(best["fingerprint"])].reset_index(drop=True)
