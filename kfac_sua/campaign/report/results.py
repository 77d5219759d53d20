"""Results of the final runs, as Markdown: their numbers, and their times to the baseline's targets."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from kfac_sua.campaign.definition import Campaign, Panel
from kfac_sua.campaign.report.panels import curve_rows, method_label, per_panel
from kfac_sua.campaign.report.paper import run_sizes
from kfac_sua.markdown import (
    NOTHING,
    bounds,
    bullets,
    count,
    escape,
    join,
    listed,
    number,
    percent,
    percent_spread,
    spread,
    table,
)
from kfac_sua.methods import BASELINE
from kfac_sua.runs.final_table import QUANTITIES, CollectError, final_table, require_one_precision
from kfac_sua.runs.run_info import UNENDED, RunInfo

_DIGITS = 3  # of ratios and times; their spread over seeds is seldom below one percent

_FINAL_COLUMNS = (
    ("Method", "left"),
    *(
        (name, "right")
        for name in (
            *("Seeds", "Training loss", "Training loss, evaluation mode", "Validation error, best"),
            *("Validation error, last epoch", "Test error", "Seconds per epoch", "×&nbsp;baseline"),
        )
    ),
)
_TARGET_COLUMNS = (
    ("Method", "left"),
    *((name, "right") for name in ("Seconds", "95 % interval", "×&nbsp;baseline", "Epochs", "95 % interval", "Seeds")),
)


def final_section(campaign: Campaign, finals: pd.DataFrame, seeds: int, infos: Sequence[RunInfo]) -> str:
    """Return the numbers of the final runs: mean and standard deviation over the finished seeds.

    Args:
        campaign: Panels and methods, in their order.
        finals: Rows of ``collect_runs`` with ``panel`` and ``method``, one setting for each pair of these.
        seeds: Seeds wanted per method.
        infos: run.json of these runs, for the epochs in which they diverged and the reasons why they failed.

    Raises:
        CollectError: If a method has several settings in a panel, or the runs are of several precisions.
    """
    require_one_precision(finals)
    sizes = run_sizes(finals, infos)
    explanation = (
        f"{f'Runs of {sizes}. ' if sizes else ''}Mean ± sample standard deviation over the finished seeds. Losses, in"
        " nats, are those of the last epoch: the training loss over its mini-batches, and in evaluation mode on a fixed"
        " subset of the training images. Errors are misclassified images. The test set was touched once, at the end of"
        " each run. Seconds are training seconds, without evaluation."
    )

    def section(panel: Panel) -> str:
        tables = {curve.method: _summary(finals, panel, curve.method) for curve in panel.curves}
        return join([_final_table(campaign, tables, seeds), bullets(_run_notes(campaign, panel, finals, seeds, infos))])

    return join([explanation, per_panel(campaign, section)])


def final_problems(campaign: Campaign, finals: pd.DataFrame, seeds: int) -> str:
    """Return a sentence on how many final runs are missing or have not finished; empty if all have."""
    wanted = seeds * sum(len(panel.curves) for panel in campaign.panels)
    statuses = finals.drop_duplicates(["panel", "method", "run"])["status"].value_counts()
    diverged, missing = int(statuses.get("diverged", 0)), wanted - int(statuses.sum())
    unended = sum(int(statuses.get(name, 0)) for name in UNENDED)
    problems = [
        f"{amount} {what}"
        for amount, what in ((diverged, "diverged"), (unended, "did not finish"), (missing, "are missing"))
        if amount > 0
    ]
    return f"**Of {count(wanted, 'final run')}, {listed(problems)}**, named below." if problems else ""


def target_section(campaign: Campaign, targets: pd.DataFrame) -> str:
    """Return how long each method needs to reach what its panel's baseline reached.

    Args:
        campaign: Panels and methods, in their order.
        targets: Result of ``targets.target_table``.
    """
    explanation = (
        "When a method's mean curve is first at or below a level of the baseline's, in training seconds and in epochs,"
        " interpolated between the ends of epochs; intervals are 95 % bootstrap intervals over seeds."
    )

    def section(panel: Panel) -> str:
        rows = targets[targets["panel"] == panel.name]
        if rows.empty:
            if not any(curve.method == BASELINE for curve in panel.curves):
                return "There is no target, since these curves have no baseline among them."
            return "There is no target, since the baseline has no finished run."
        return join([_target_table(campaign, panel, rows[rows["target"] == name]) for name in rows["target"].unique()])

    return join([explanation, per_panel(campaign, section)])


def _summary(finals: pd.DataFrame, panel: Panel, method: str) -> "pd.Series[Any] | None":
    """Return the row of ``final_table`` of one curve; None without a run."""
    rows = curve_rows(finals, panel.name, method)
    if rows.empty:
        return None
    settings = final_table(rows)
    if len(settings) != 1:
        raise CollectError(
            f"Final runs of {method} in panel {panel.name} must have one setting, got {len(settings)};"
            " pass those of the chosen cell only."
        )
    return settings.iloc[0]


def _final_table(campaign: Campaign, summaries: "Mapping[str, pd.Series[Any] | None]", seeds: int) -> str:
    baseline = summaries.get(BASELINE)
    baseline_seconds = math.nan if baseline is None else float(baseline["seconds_per_epoch_mean"])
    rows = [
        [
            method_label(campaign, method),
            *([f"0 of {seeds}", *[NOTHING] * 7] if summary is None else _final_cells(summary, seeds, baseline_seconds)),
        ]
        for method, summary in summaries.items()
    ]
    return table(_FINAL_COLUMNS, rows)


def _final_cells(summary: "pd.Series[Any]", seeds: int, baseline_seconds: float) -> list[str]:
    """Return the cells of one method, after its name."""
    numbers = {name: (summary[f"{name}_mean"], summary[f"{name}_std"]) for name in QUANTITIES}
    finished = int(summary["finished"])
    return [
        str(finished) if finished == seeds else f"{finished} of {seeds}",
        *(spread(*numbers[name]) for name in ("train_loss", "train_eval_loss")),
        *(percent_spread(*numbers[name]) for name in ("best_val_error", "final_val_error", "test_error")),
        spread(*numbers["seconds_per_epoch"], _DIGITS),
        number(numbers["seconds_per_epoch"][0] / baseline_seconds, _DIGITS),
    ]


def _run_notes(
    campaign: Campaign, panel: Panel, finals: pd.DataFrame, seeds: int, infos: Sequence[RunInfo]
) -> list[str]:
    """Return a sentence per method whose seeds have not all finished, naming these."""
    found = {(info.fingerprint, info.seed): info for info in infos}
    notes = []
    for curve in panel.curves:
        runs = curve_rows(finals, panel.name, curve.method).drop_duplicates("run").sort_values("seed")
        texts = [
            _ending(run, found.get((run["fingerprint"], run["seed"])))
            for _, run in runs[runs["status"] != "finished"].iterrows()
        ]
        if len(runs) < seeds:
            texts.append(f"{count(seeds - len(runs), 'run')} missing")
        if texts:
            notes.append(f"{method_label(campaign, curve.method)}: {listed(texts)}.")
    return notes


def _ending(run: "pd.Series[Any]", info: RunInfo | None) -> str:
    """Return how an unfinished seed ended."""
    seed = f"seed {run['seed']}"
    if run["status"] == "diverged":
        epoch = None if info is None else info.diverged_at_epoch
        return f"{seed} diverged" + ("" if epoch is None else f" in epoch {epoch}")
    if run["status"] == "failed":
        reason = None if info is None else info.failure
        return f"{seed} failed" + ("" if reason is None else f": {escape(reason.rstrip('.'))}")
    return f"{seed} has not finished"


def _target_table(campaign: Campaign, panel: Panel, rows: pd.DataFrame) -> str:
    """Return one target's table."""
    level = float(rows["target_value"].iloc[0])
    if rows["target"].iloc[0] == "val_error":
        title = f"Target: the baseline's lowest mean validation error, {percent(level)}"
    else:
        title = f"Target: the baseline's final mean training loss, {number(level)} nats"
    by_method = {row["method"]: row for _, row in rows.iterrows()}
    baseline_seconds = float(by_method[BASELINE]["seconds"]) if BASELINE in by_method else math.nan
    cells = [
        [
            method_label(campaign, curve.method),
            *(
                _target_cells(by_method[curve.method], baseline_seconds)
                if curve.method in by_method
                else [*[NOTHING] * 5, "0"]
            ),
        ]
        for curve in panel.curves
    ]
    return join([f"**{title}**", table(_TARGET_COLUMNS, cells)])


def _target_cells(row: "pd.Series[Any]", baseline_seconds: float) -> list[str]:
    """Return the cells of one method, after its name."""
    ratio = row["seconds"] / baseline_seconds if baseline_seconds else math.nan
    return [
        number(row["seconds"], _DIGITS),
        bounds(row["seconds_low"], row["seconds_high"], _DIGITS),
        number(ratio, _DIGITS),
        number(row["epochs"], _DIGITS),
        bounds(row["epochs_low"], row["epochs_high"], _DIGITS),
        str(row["seeds"]),
    ]
