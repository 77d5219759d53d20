"""``start_from``: a new run with more epochs that begins with the final state of a finished run."""

import dataclasses
import functools
from pathlib import Path

import torch

from kfac_sua.compose.saved import config_of
from kfac_sua.config import Config, ConfigError, KroneckerConfig, ScheduleName, shown
from kfac_sua.runs.directory import RunDirectory, deciding_values, fingerprint, flat, resolved
from kfac_sua.runs.metrics import EpochRecord, read_ended_records
from kfac_sua.runs.run_info import RunInfo, read_run_info
from kfac_sua.training.checkpoint import Checkpoint, load_checkpoint, present_name
from kfac_sua.training.fitting import check_fits
from kfac_sua.training.state import Training


@dataclasses.dataclass(frozen=True)
class Source:
    """The finished run that a new run starts from.

    Attributes:
        checkpoint: Its final state.
        records: Its rows, which become the first rows of the new run.
        info: Its run.json.
    """

    checkpoint: Checkpoint
    records: list[EpochRecord]
    info: RunInfo


def read_source(training: Training) -> Source | None:
    """Return the run that a new run starts from; ``None`` without ``start_from``.

    Args:
        training: The state before the first step; it is not changed.

    Raises:
        ConfigError: If ``start_from`` is not a finished run with the same settings and fewer epochs, or if a schedule
            depends on the number of epochs.
        CheckpointError: If its last checkpoint is damaged.
        RecordError: If its records are damaged.
    """
    config = training.config
    if config.start_from is None:
        return None
    path = Path(config.start_from)
    info = read_run_info(path / "run.json")
    if info.status != "finished":
        raise ConfigError(f"start_from={path} has not finished (it is {info.status}); start from one that has.")
    _check_settings(config, info, training.device.type, training.process_group.size)
    directory = RunDirectory(path, info.fingerprint, info.seed)
    checkpoint = load_checkpoint(
        present_name(directory.checkpoint),
        fingerprint=info.fingerprint,
        seed=info.seed,
        device=training.device if training.process_group.size == 1 else torch.device("cpu"),
        data_digest=training.data_digest,
        check=functools.partial(check_fits, training),
        is_own=False,
    )
    if checkpoint is None:
        raise ConfigError(f"start_from={path} has no {directory.checkpoint.name}, the state that it ended in.")
    return Source(checkpoint, read_ended_records(directory.metrics, info), info)


def _check_settings(config: Config, info: RunInfo, device: str, num_processes: int) -> None:
    before = config_of(info.config, config.start_from)
    if config.epochs <= before.epochs:
        raise ConfigError(
            f"epochs={config.epochs} must be more than the {before.epochs} of start_from={config.start_from}."
        )
    alike = dataclasses.replace(config, epochs=before.epochs, start_from=info.config.get("start_from"))
    if fingerprint(alike, device, num_processes, info.source) != info.fingerprint or config.seed != info.seed:
        theirs, ours = flat(info.config), flat(resolved(alike, device))
        differing = [
            key for key in flat(deciding_values(alike, info.source)) if theirs.get(key, ours[key]) != ours[key]
        ]
        said = ", ".join(f"{key} was {shown(theirs[key])} and is {shown(ours[key])}" for key in differing[:3])
        raise ConfigError(
            f"start_from={config.start_from} is a run of other settings ({said or 'of another number of processes'}); "
            f"only epochs may differ: begin with --rerun {config.start_from}."
        )
    if config.schedule.name is not ScheduleName.constant:
        raise ConfigError(
            f"schedule={config.schedule.name} goes by the share of a run's epochs: with more of them learning rates "
            "would have been others from the start; only runs of schedule=constant can be trained on."
        )
    if isinstance(config.preconditioner, KroneckerConfig) and config.preconditioner.damping_final is not None:
        raise ConfigError(
            "preconditioner.damping_final is that of the last epoch, and with more of them would have been another one "
            "from the start; only runs without it can be trained on."
        )
