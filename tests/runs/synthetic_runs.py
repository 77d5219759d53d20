"""Run directories with known numbers, written by the package's own record functions."""

from pathlib import Path
from typing import Any

from kfac_sua.runs.metrics import EpochRecord, rewrite_records
from kfac_sua.runs.run_info import RunInfo, Status, write_run_info

STARTED = "2026-01-02T03:04:05+00:00"


def epoch_record(epoch: int, **values: float) -> EpochRecord:
    """Return a record whose unnamed columns are simple functions of the epoch."""
    numbers: dict[str, float] = {
        "lr": 0.1,
        "train_loss": 2.0 / epoch,
        "train_error": 0.5 / epoch,
        "train_eval_loss": 1.5 / epoch,
        "val_loss": 2.5 / epoch,
        "val_error": 0.6 / epoch,
        "train_time_s": 10.0 * epoch,
        "forward_backward_s": 6.0 * epoch,
        "statistics_s": 1.0 * epoch,
        "inversion_s": 1.5 * epoch,
        "application_s": 0.75 * epoch,
        "optimizer_s": 0.5 * epoch,
    }
    return EpochRecord(epoch=epoch, step=50 * epoch, **(numbers | values))


def run_info(preconditioner: str = "sua", seed: int = 0, lr: float = 0.1, **values: Any) -> RunInfo:
    """Return the run.json content of a finished run."""
    group: dict[str, Any] = {"name": preconditioner}
    if preconditioner != "baseline":
        group["damping"] = 0.01
    config = {
        "preconditioner": group,
        "optimizer": {"name": "sgd", "lr": lr},
        "schedule": {"name": "constant"},
        "model": {"name": "tiny", "width": 1.0},
        "dataset": {"name": "digits"},
        "seed": seed,
    }
    fields: dict[str, Any] = {
        "status": "finished",
        "config": config,
        "fingerprint": f"{preconditioner}-{lr}",
        "seed": seed,
        "commit": None,
        "versions": {"python": "3.11.7", "torchvision": None},
        "device": "cpu",
        "device_name": "a processor",
        "num_threads": 1,
        "started": STARTED,
        "ended": "2026-01-02T03:14:05+00:00",
        "test_loss": 0.5,
        "test_error": 0.25,
    }
    return RunInfo(**(fields | values))


def write_run(
    root: Path,
    records: list[EpochRecord],
    preconditioner: str = "sua",
    seed: int = 0,
    lr: float = 0.1,
    status: Status = "finished",
    **values: Any,
) -> Path:
    """Write a run directory below root and return it."""
    directory = root / f"digits-tiny-{preconditioner}" / f"lr={lr}" / f"seed={seed}"
    directory.mkdir(parents=True)
    if status != "finished":
        values = {"ended": None, "test_loss": None, "test_error": None} | values
    write_run_info(directory / "run.json", run_info(preconditioner, seed, lr, status=status, **values))
    if records:
        rewrite_records(directory / "metrics.csv", records)
    return directory
