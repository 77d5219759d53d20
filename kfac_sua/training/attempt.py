"""What an attempt at a run finds in the run's directory: whether the run has ended, its checkpoint and its records."""

import contextlib
import dataclasses
import functools
from datetime import UTC, datetime

import torch

from kfac_sua.command_line import kept_command, say
from kfac_sua.config import Config, GroupSizeScaling, KroneckerConfig
from kfac_sua.runs.directory import RunDirectory, end_of, resolved, run_directory
from kfac_sua.runs.environment import environment
from kfac_sua.runs.metrics import EpochRecord, read_ended_records, read_records, records_digest
from kfac_sua.runs.run_info import ENDED, RecordError, RunInfo, failure_reason, read_run_info
from kfac_sua.training.checkpoint import Checkpoint, CheckpointError, adopt_old_name, load_checkpoint
from kfac_sua.training.fitting import check_fits
from kfac_sua.training.launch import Invocation
from kfac_sua.training.state import Training


def find_ended(directory: RunDirectory, label: str = "") -> RunInfo | None:
    """Return run.json if the run has finished or diverged, and print how.

    Args:
        directory: The run's directory.
        label: Beginning of the printed line.
    """
    info = read_own_info(directory)
    if info is None or info.status not in ENDED:
        return None
    print(f"{label}already {summary_line(directory, info)}", flush=True)
    return info


def tell_of_unscaled_groups(config: Config, directory: RunDirectory, device: str, num_processes: int) -> None:
    """Say that the same command had another directory before ``group_size_scaling``, if a run began there then.

    Args:
        config: The checked configuration.
        directory: The run's directory; nothing is said where a run has begun there.
        device: ``cpu`` or ``cuda``.
        num_processes: Processes that carry it out together.
    """
    own = config.preconditioner
    if not isinstance(own, KroneckerConfig) or own.group_size is None or directory.info.exists():
        return
    unscaled = dataclasses.replace(own, group_size_scaling=GroupSizeScaling.none)
    older = run_directory(dataclasses.replace(config, preconditioner=unscaled), device, num_processes)
    if older.path == directory.path or not older.info.exists():
        return
    with contextlib.suppress(RecordError):  # a damaged record of another run is no concern of this one
        if "group_size_scaling" not in read_run_info(older.info).config["preconditioner"]:
            say(
                f"This is a new run, in groups of {own.channels_per_group(config.model.width)}: before there was "
                f"preconditioner.group_size_scaling, this command made one in groups of {own.group_size}; give "
                f"preconditioner.group_size_scaling=none to go on with that, {older.path}."
            )


def read_own_info(directory: RunDirectory) -> RunInfo | None:
    """Return run.json if there is one, after a check that it belongs to this run."""
    info = read_run_info(directory.info) if directory.info.exists() else None
    if info is not None and (info.fingerprint != directory.fingerprint or info.seed != directory.seed):
        raise RecordError(f"{directory.info} belongs to another run; restore it, or move {directory.path} away.")
    return info


def restore(training: Training, checkpoint: Checkpoint, directory: RunDirectory) -> None:
    """Restore the state of a checkpoint, or raise one sentence if it does not fit.

    Args:
        training: The state before the first step, changed in place.
        checkpoint: What to go on from.
        directory: The run's directory, which the error names.

    Raises:
        CheckpointError: If the checkpoint does not fit.
    """
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
        # With several processes it is broadcast from the CPU: its tensors must not be on the main process's GPU.
        device=training.device if training.process_group.size == 1 else torch.device("cpu"),
        data_digest=training.data_digest,
        check=functools.partial(check_fits, training),
    )
    if checkpoint is None:
        return None, []
    # A row is written before its checkpoint, so a crash between the two leaves one row too many.
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
    """Return the run.json of a run that begins; all processes have to call this, as it gathers their machines."""
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
        started=now(),
        command=kept_command(),
        overrides=list(invocation.overrides),
        source=None if config.start_from is None else end_of(config.start_from),
    )


def continued_info(begun: RunInfo, current: RunInfo, is_resumed: bool) -> RunInfo:
    """Return the run.json of a run that an earlier attempt began, perhaps on another machine.

    Args:
        begun: The run.json of the earlier attempts.
        current: The run.json that a new run would have now.
        is_resumed: Whether there is a checkpoint, so that seconds of the earlier attempts count.
    """
    device_name = begun.device_name if is_resumed else current.device_name
    merged = with_machines_of(begun, current) if is_resumed else current
    config = begun.config
    if "capture" in config:  # its absence tells what ``precision`` meant in older runs
        config = config | {"capture": current.config["capture"]}
    return dataclasses.replace(
        begun,
        status="running",
        config=config,
        failure=None,
        device_name=device_name,
        machines=merged.machines,
        process_counts=merged.process_counts,
    )


def with_machines_of(earlier: RunInfo, current: RunInfo) -> RunInfo:
    """Return the current run.json with the machines of an earlier one before its own, as seconds come from both."""
    return dataclasses.replace(
        current,
        machines=list(dict.fromkeys([*earlier.machines, *current.machines])),
        process_counts=list(dict.fromkeys([*earlier.process_counts, *current.process_counts])),
    )


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


def now() -> str:
    """Return the time as run.json has it: UTC, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")
