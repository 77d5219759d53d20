"""Many run directories as one table, a row per epoch.

Command line: ``python -m kfac_sua.runs.collect outputs/runs [--best-by train_loss] [--csv epochs.csv]``.
"""

if __name__ == "__main__":  # before the imports that take seconds
    from kfac_sua.startup import begin

    begin()

import argparse
import dataclasses
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from kfac_sua.command_line import BAD_INPUT, say
from kfac_sua.files.atomic import write_atomically
from kfac_sua.files.openers import refuse_special
from kfac_sua.runs.comparable import CIRCUMSTANCES, circumstances, seconds_cautions
from kfac_sua.runs.directory import with_channels_per_group
from kfac_sua.runs.final_table import QUANTITIES, SETTING_COLUMNS, CollectError, final_table, select_best
from kfac_sua.runs.metrics import COLUMNS, EpochRecord, read_ended_records
from kfac_sua.runs.run_info import RecordError, RunInfo, read_run_info
from kfac_sua.runs.summary import MAX_WIDTH, format_table
from kfac_sua.startup import run_command

RUN_COLUMNS = ("run", *SETTING_COLUMNS, "seed", "status", "test_error", *CIRCUMSTANCES)


def collect_runs(root: Path) -> pd.DataFrame:
    """Return one row per epoch of every run below a directory.

    Args:
        root: Directory searched, at any depth, for run.json.

    Returns:
        The columns of metrics.csv plus ``RUN_COLUMNS``: ``run`` is the directory relative to ``root``, ``base_lr`` the
        configured learning rate (``lr`` is the epoch's, which follows the schedule), ``damping`` NaN for the baseline,
        ``group_size`` the channels per group that the preconditioner got, NaN without groups, ``precision`` as in
        ``RunInfo``, and ``test_error`` NaN until the run has finished. The columns in ``CIRCUMSTANCES`` say what
        seconds depend on beside the method. A run without a complete epoch has one row with epoch 0 and NaN for
        measured values, so that it is not lost.

    Raises:
        CollectError: If there is no run, a directory has metrics.csv without run.json, or a run occurs twice.
        RecordError: If a file of a run cannot be read.
    """
    paths = sorted(root.rglob("run.json"))
    if not paths:
        raise CollectError(f"No run below {root}: it has no run.json at any depth; give the directory of the runs.")
    orphans = [path.parent for path in sorted(root.rglob("metrics.csv")) if path.with_name("run.json") not in paths]
    if orphans:
        raise CollectError(f"{orphans[0]} has metrics.csv but no run.json; restore it or remove the directory.")
    frame = collect_directories(root, [path.parent for path in paths])
    # A setting that has a seed twice would count one run twice in every mean.
    runs = frame.drop_duplicates("run")
    twice = runs[runs.duplicated(["fingerprint", "seed"], keep=False)].sort_values(["fingerprint", "seed"])
    if len(twice):
        first, second = twice["run"].iloc[:2]
        raise CollectError(f"{first} and {second} are the same run (equal configuration and seed); move one away.")
    return frame


def collect_directories(root: Path, directories: Sequence[Path]) -> pd.DataFrame:
    """Return the table of :func:`collect_runs` for some runs.

    Args:
        root: Directory to which the names of the runs are relative.
        directories: The directories of the runs.

    Raises:
        CollectError: If the epochs of a run are not in order, or missing although it has finished.
        RecordError: If a file of a run cannot be read.
    """
    rows = [row for path in directories for row in run_rows(root, path / "run.json")]
    return pd.DataFrame(rows, columns=[*RUN_COLUMNS, *COLUMNS])


def final_runs_root(root: Path) -> Path:
    """Return the directory of the runs that figures show: the final runs of a campaign, else the directory itself.

    Args:
        root: Directory of a campaign, with ``grid`` and ``final`` runs, or any directory of runs.
    """
    final = root / "final"
    return final if final.is_dir() and (root / "grid").is_dir() else root


def run_rows(root: Path, path: Path) -> list[dict[str, Any]]:
    """Return the rows of one run in the table of ``collect_runs``.

    Args:
        root: Directory to which the run's name is relative.
        path: Its run.json.

    Raises:
        CollectError: If its epochs are not in order, or missing although it has finished.
        RecordError: If one of its files cannot be read.
    """
    info, metrics = read_run_info(path), path.with_name("metrics.csv")
    records = read_ended_records(metrics, info) if metrics.exists() else []
    epochs = [record.epoch for record in records]
    if epochs != sorted(set(epochs)):
        raise CollectError(f"{metrics} does not hold each epoch once, in order; remove the run and start it again.")
    if not records and info.status == "finished":
        raise CollectError(f"{path.parent} is marked as finished but has no epoch; remove it and start it again.")
    run = _run_values(root, path, info)
    if not records:  # no epoch is complete: one row without metrics
        records = [EpochRecord(0, 0, *[math.nan] * (len(COLUMNS) - 2))]  # type: ignore[arg-type]  # counts are NaN as well
    return [run | dataclasses.asdict(record) for record in records]


def _run_values(root: Path, path: Path, info: RunInfo) -> dict[str, Any]:
    """Return the values that all rows of a run share, in the order of ``RUN_COLUMNS``."""
    try:
        preconditioner = info.config["preconditioner"]
        name = str(preconditioner["name"])
        group_size = with_channels_per_group(info.config)["preconditioner"].get("group_size")
        return {
            "run": path.parent.relative_to(root).as_posix(),
            "dataset": str(info.config["dataset"]["name"]),
            "model": str(info.config["model"]["name"]),
            "width": float(info.config["model"]["width"]),
            "batch_norm": bool(info.config["model"].get("batch_norm", True)),
            "preconditioner": name,
            "optimizer": str(info.config["optimizer"]["name"]),
            "schedule": str(info.config["schedule"]["name"]),
            "base_lr": float(info.config["optimizer"]["lr"]),
            "damping": math.nan if name == "baseline" else float(preconditioner["damping"]),
            "group_size": math.nan if group_size is None else float(group_size),
            "precision": info.precision,
            "fingerprint": info.fingerprint,
            "seed": info.seed,
            "status": info.status,
            "test_error": math.nan if info.test_error is None else info.test_error,
            **circumstances(info),
        }
    except (KeyError, TypeError, ValueError) as error:
        raise CollectError(f"The config in {path} lacks or misuses a key ({error!r}); move the run away.") from error


def table_text(frame: pd.DataFrame) -> str:
    """Return the final table as text, and below it the reasons why seconds cannot be compared, if there are any.

    Args:
        frame: Result of ``collect_runs``.
    """
    cautions = [textwrap.fill(sentence, MAX_WIDTH) for sentence in seconds_cautions(frame)]
    return "\n".join([format_table(final_table(frame)), *cautions])


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the final table of all runs below a directory.

    Args:
        arguments: Command line without the program's name; None reads it from the process.

    Returns:
        0, or 2 for bad input, after a sentence that says what is wrong.
    """
    parser = argparse.ArgumentParser(prog="python -m kfac_sua.runs.collect", description="Summarise finished runs.")
    parser.add_argument("root", type=Path, help="directory searched, at any depth, for runs")
    parser.add_argument(
        "--best-by", choices=QUANTITIES, help="keep the setting per method with the lowest mean of this"
    )
    parser.add_argument("--csv", type=Path, metavar="OUT", help="also write one row per epoch of every run here")
    options = parser.parse_args(arguments)
    try:
        frame = collect_runs(options.root)
        shown = select_best(frame, options.best_by) if options.best_by else frame
        if options.csv:
            refuse_special(options.csv)
            write_atomically(options.csv, frame.to_csv(index=False).encode())
    except (CollectError, RecordError) as error:
        return say(error, BAD_INPUT)
    except OSError as error:
        return say(f"Cannot write {options.csv}: {error.strerror or error}.", BAD_INPUT)
    print(table_text(shown))
    return 0


if __name__ == "__main__":
    run_command(main)
