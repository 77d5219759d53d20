"""What a run has left, and whether it is bit for bit what an undisturbed run leaves."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from identical import assert_identical
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from kfac_sua.compose import compose_config
from kfac_sua.runs.directory import RunDirectory, run_directory
from kfac_sua.runs.metrics import EpochRecord, read_records
from kfac_sua.runs.run_info import RunInfo, read_run_info
from kfac_sua.runs.tensorboard import SCALARS
from kfac_sua.training.checkpoint import Checkpoint, load_checkpoint

# 24 steps of 50 digits, refreshed every third or fourth one; a few steps lie between two checkpoints, 30 ms apart.
SMALL_RUN = (
    *("model=tiny", "dataset=digits", "dataset.train_size=400", "dataset.train_eval_size=100", "batch_size=50"),
    *("epochs=3", "device=cpu", "num_threads=1", "progress=none", "checkpoint_interval_s=0.03"),
)
STRUCTURES = ("kfac", "sua", "grouped", "sua_grouped")
_RANDOM = ("dataset.augmentation=flip_crop", "schedule=step", "dataset.split_seed=1")
_MC = ("preconditioner.fisher_type=mc", "preconditioner.ema_decay=0.9", "preconditioner.factor_period=2")

# Name of a setting -> its part of the command line.
SETTINGS: dict[str, tuple[str, ...]] = {
    "baseline": ("preconditioner=baseline",),
    "baseline_augmented": ("preconditioner=baseline", *_RANDOM),
    **{name: (f"preconditioner={name}", "preconditioner.inverse_period=3") for name in STRUCTURES},
    **{
        f"{name}_mc_ema": (f"preconditioner={name}", "preconditioner.inverse_period=4", *_MC, *_RANDOM)
        for name in STRUCTURES
    },
}
for _name in ("grouped", "sua_grouped", "grouped_mc_ema", "sua_grouped_mc_ema"):
    SETTINGS[_name] += ("preconditioner.group_size=8",)

# Measured seconds differ from run to run, and where a run lies from case to case.
_FREE_FIELDS = {"times", "records_digest"}
_FREE_CONFIG = {"output_dir", "checkpoint_interval_s"}


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a run has left.

    Attributes:
        info: Its run.json.
        records: Its metrics.csv.
        points: TensorBoard tag -> (step, value) of every point, in the order of the file.
        state: Its checkpoint; None if there is none.
    """

    info: RunInfo
    records: list[EpochRecord]
    points: dict[str, list[tuple[int, float]]]
    state: Checkpoint | None


def command_line(setting: str, output_dir: Path, *more: str) -> list[str]:
    """Return the arguments of a small run.

    Args:
        setting: One of ``SETTINGS``.
        output_dir: Where it writes.
        more: Further overrides.
    """
    return [*SMALL_RUN, *SETTINGS[setting], f"output_dir={output_dir}", *more]


def directory_of(arguments: list[str]) -> RunDirectory:
    """Return where a command writes."""
    return run_directory(compose_config(arguments), "cpu")


def saved_state(directory: RunDirectory, seed: int = 0) -> Checkpoint | None:
    """Return the last sound checkpoint of a run, if there is one."""
    return load_checkpoint(
        directory.checkpoint, fingerprint=directory.fingerprint, seed=seed, device=torch.device("cpu")
    )


def steps_on_disk(directory: RunDirectory) -> int:
    """Return the step from which the same command would go on."""
    state = saved_state(directory)
    return 0 if state is None else state.step


def read_outcome(directory: RunDirectory, seed: int = 0) -> Outcome:
    """Return what a run has left.

    Args:
        directory: Where it lies.
        seed: Its seed.

    Raises:
        RecordError: If its records cannot be read.
        CheckpointError: If its checkpoint cannot.
    """
    events = EventAccumulator(str(directory.path), size_guidance={"scalars": 0})
    events.Reload()
    tags = [tag for tag in SCALARS if tag in events.Tags()["scalars"]]  # what is never measured has none
    points = {tag: [(point.step, point.value) for point in events.Scalars(tag)] for tag in tags}
    return Outcome(read_run_info(directory.info), read_records(directory.metrics), points, saved_state(directory, seed))


def difference(actual: Outcome, expected: Outcome) -> str:
    """Return where an outcome differs from that of an undisturbed run, but for measured seconds; else nothing.

    Args:
        actual: Of the run that met faults.
        expected: Of the undisturbed one.
    """
    try:
        assert_identical(_comparable(actual), _comparable(expected), "run")
    except AssertionError as error:
        return " ".join(str(error).split())[:400] or "the two differ"
    return _disorder(actual)


def _comparable(outcome: Outcome) -> dict[str, Any]:
    info = outcome.info
    state = {} if outcome.state is None else dict(vars(outcome.state))
    return {
        "status": info.status,
        "config": {key: value for key, value in info.config.items() if key not in _FREE_CONFIG},
        "fingerprint": info.fingerprint,
        "seed": info.seed,
        "test": (info.test_loss, info.test_error, info.diverged_at_epoch),
        "skipped_steps": info.skipped_steps,
        "records": [{k: v for k, v in vars(record).items() if not k.endswith("_s")} for record in outcome.records],
        "points": {
            tag: [step if tag.startswith("time/") else (step, value) for step, value in points]
            for tag, points in outcome.points.items()
        },
        "state": {name: value for name, value in state.items() if name not in _FREE_FIELDS},
    }


def _disorder(outcome: Outcome) -> str:
    """Return which measured seconds run backwards, if any do."""
    for name in (name for name in vars(outcome.records[0]) if name.endswith("_s")):
        seconds = [getattr(record, name) for record in outcome.records]
        if seconds != sorted(seconds):
            return f"{name} decreases: {seconds}"
    return ""
