"""What an attempt at a run finds in the run's directory, and what it leaves there: run.json, rows and checkpoint."""

import contextlib
import dataclasses
import functools
import io
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from kfac_sua.command_line import kept_command
from kfac_sua.runs.atomic import write_atomically
from kfac_sua.runs.directory import RunDirectory, end_of, resolved
from kfac_sua.runs.environment import environment
from kfac_sua.runs.lock import exclusive
from kfac_sua.runs.metrics import (
    EpochRecord,
    best_epoch,
    read_ended_records,
    read_records,
    records_digest,
    rewrite_records,
)
from kfac_sua.runs.run_info import ENDED, RecordError, RunInfo, failure_reason, read_run_info, write_run_info
from kfac_sua.training.checkpoint import Checkpoint, CheckpointError, adopt_old_name, load_checkpoint, previous_path
from kfac_sua.training.fitting import check_fits
from kfac_sua.training.launch import Invocation
from kfac_sua.training.state import Training, weights


def find_ended(directory: RunDirectory, place: str = "") -> RunInfo | None:
    """Say so if the run has finished or diverged, after its place in a sweep, and return what it left."""
    info = read_own_info(directory)
    if info is None or info.status not in ENDED:
        return None
    print(f"{place}already {summary_line(directory, info)}", flush=True)
    return info


def read_own_info(directory: RunDirectory) -> RunInfo | None:
    """Return what run.json says of the run, if there is one."""
    info = read_run_info(directory.info) if directory.info.exists() else None
    if info is not None and (info.fingerprint != directory.fingerprint or info.seed != directory.seed):
        raise RecordError(f"{directory.info} belongs to another run; restore it, or move {directory.path} away.")
    return info


def restore(training: Training, checkpoint: Checkpoint, directory: RunDirectory) -> None:
    """Go on from a checkpoint, or say that it does not fit."""
    try:
        training.restore(checkpoint)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise CheckpointError(
            f"{directory.checkpoint} does not fit ({failure_reason(error).removesuffix('.')}); move it away to start "
            "this run from the beginning."
        ) from error


def read_checkpoint(training: Training, directory: RunDirectory) -> tuple[Checkpoint | None, list[EpochRecord]]:
    """Return the last checkpoint, if there is one, and the records up to it."""
    adopt_old_name(directory.checkpoint)
    checkpoint = load_checkpoint(
        directory.checkpoint,
        fingerprint=directory.fingerprint,
        seed=training.config.seed,
        # What is told to other processes must not lie on this one's GPU.
        device=training.device if training.process_group.size == 1 else torch.device("cpu"),
        data_digest=training.data_digest,
        check=functools.partial(check_fits, training),
    )
    if checkpoint is None:
        return None, []
    # A row is written before its checkpoint, so that a crash between the two leaves a row too many.
    records = [record for record in read_records(directory.metrics) if record.epoch <= checkpoint.epoch]
    is_complete = [record.epoch for record in records] == list(range(checkpoint.epoch + 1))
    if is_complete and records_digest(records) != checkpoint.records_digest:
        raise RecordError(
            f"{directory.metrics} is not as it was when {directory.checkpoint.name} was written; restore it, or move "
            "the directory away to start this run from the beginning."
        )
    if not is_complete:
        raise RecordError(
            f"{directory.metrics} lacks epochs that {directory.checkpoint.name} has completed ({checkpoint.epoch}); "
            "restore it, or move the directory away to start this run from the beginning."
        )
    return checkpoint, records


def new_info(training: Training, directory: RunDirectory, invocation: Invocation) -> RunInfo:
    """Return what run.json says of a run that begins; all processes have to ask."""
    config, device = training.config, training.device
    surroundings = environment(device.type)
    return RunInfo(
        status="running",
        config=resolved(config, device.type),
        fingerprint=directory.fingerprint,
        seed=config.seed,
        commit=surroundings.commit,
        versions=surroundings.versions,
        device=device.type,
        device_name=surroundings.device_name,
        machines=list(dict.fromkeys(training.process_group.all_gather(surroundings.machine))),
        num_threads=torch.get_num_threads(),
        process_counts=[training.process_group.size],
        started=_now(),
        command=kept_command(),
        overrides=list(invocation.overrides),
        source=None if config.start_from is None else end_of(config.start_from),
    )


def continued_info(begun: RunInfo, now: RunInfo, is_resumed: bool) -> RunInfo:
    """Return what a run is from here on that an earlier attempt has begun, maybe on another machine."""
    device_name = begun.device_name if is_resumed else now.device_name
    spent = with_seconds_of(begun, now) if is_resumed else now
    config = begun.config
    if "capture" in config:  # without it a run tells what its precision meant
        config = config | {"capture": now.config["capture"]}
    return dataclasses.replace(
        begun,
        status="running",
        config=config,
        failure=None,
        device_name=device_name,
        machines=spent.machines,
        process_counts=spent.process_counts,
    )


def with_seconds_of(earlier: RunInfo, now: RunInfo) -> RunInfo:
    """Return what a run is whose first seconds were spent by an attempt before, or by the run that it starts from."""
    return dataclasses.replace(
        now,
        machines=list(dict.fromkeys([*earlier.machines, *now.machines])),
        process_counts=list(dict.fromkeys([*earlier.process_counts, *now.process_counts])),
    )


def prepare_directory(directory: RunDirectory, info: RunInfo, records: list[EpochRecord]) -> None:
    """Write what stands before the first step; nothing of a run is on disk before this."""
    write_config(directory.config, info.config)
    write_run_info(directory.info, info)
    rewrite_records(directory.metrics, records)


def write_config(path: Path, values: dict[str, Any]) -> None:
    """Write a run's configuration in the form that ``--rerun`` reads."""
    write_atomically(path, OmegaConf.to_yaml(OmegaConf.create(values)).encode())


def write_weights(
    directory: RunDirectory, training: Training, records: list[EpochRecord], *, is_finished: bool
) -> None:
    """Write the best weights and, of a run that has not diverged, the last ones, as ``torch.load`` reads them.

    A run that was begun before the best were kept may have had them then: there are none.
    """
    best = training.best
    states = {"best": best["model"] if best is not None and best["epoch"] == best_epoch(records) else None}
    states["last"] = weights(training.model) if is_finished else None
    for name, state in states.items():
        if state is not None:
            buffer = io.BytesIO()
            torch.save(state, buffer)
            write_atomically(directory.weights[name], buffer.getvalue())


def write_end(
    directory: RunDirectory, info: RunInfo, records: list[EpochRecord], skipped_steps: int, outcome: dict[str, Any]
) -> RunInfo:
    """Write how the run ended into run.json, and remove the checkpoint before the last; return what it says now."""
    digest = records_digest(records)
    ended = dataclasses.replace(info, ended=_now(), skipped_steps=skipped_steps, records_digest=digest, **outcome)
    write_run_info(directory.info, ended)
    for leftover in (previous_path(directory.checkpoint), directory.checkpoint.with_name("checkpoint.state.tmp")):
        leftover.unlink(missing_ok=True)
    return ended


def record_failure(directory: RunDirectory, error: Exception) -> None:
    """Write into run.json why this attempt failed, where it can be written: who started the run is told anyway."""
    with contextlib.suppress(OSError, RecordError):
        info = read_run_info(directory.info)
        if info.status not in ENDED:
            write_run_info(directory.info, dataclasses.replace(info, status="failed", failure=failure_reason(error)))


def record_early_failure(directory: RunDirectory, error: Exception) -> None:
    """Do so for an error before the directory was locked, if the run has begun in an earlier attempt."""
    if directory.info.exists():
        with exclusive(directory.path):
            record_failure(directory, error)


def summary_line(directory: RunDirectory, info: RunInfo) -> str:
    """Return one line: how the run ended, its numbers, and where it lies."""
    if info.status == "diverged":
        return f"diverged in epoch {info.diverged_at_epoch} (the loss is not finite): {directory.path}"
    records = read_ended_records(directory.metrics, info) if directory.metrics.exists() else []
    if not records or records[-1].epoch != info.config.get("epochs") or info.test_error is None:
        raise RecordError(
            f"{directory.info} says that the run has finished, but its records are incomplete; move {directory.path} "
            "away to start it from the beginning."
        )
    last = records[-1]
    return (
        f"finished: epoch {last.epoch}, val error {last.val_error:.2%}, test error {info.test_error:.2%}, "
        f"{last.train_time_s:.1f} s of training: {directory.path}"
    )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
