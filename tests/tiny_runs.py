"""Runs small enough for tests: four mini-batches of digits per epoch through a network of 5,000 parameters."""

import copy
import dataclasses
import functools
from pathlib import Path

from kfac_sua.compose import compose_config
from kfac_sua.config import Config
from kfac_sua.device import device_type
from kfac_sua.runs.directory import RunDirectory, run_directory
from kfac_sua.runs.metrics import EpochRecord, read_records

TINY = (
    "model=tiny",
    "dataset=digits",
    "dataset.train_size=400",
    "device=cpu",
    "num_threads=1",
    "progress=none",
)
# Refreshes fall inside epochs, so that a resume in between needs the inverses of an earlier mini-batch.
TINY_PERIOD = "preconditioner.inverse_period=3"


def tiny_config(output_dir: Path, *overrides: str) -> Config:
    """Return the configuration of a tiny run that writes below ``output_dir``."""
    compose = _composed.__wrapped__ if any("/" in one for one in overrides) else _composed  # files may change
    return dataclasses.replace(copy.deepcopy(compose(overrides)), output_dir=str(output_dir))


@functools.cache
def _composed(overrides: tuple[str, ...]) -> Config:
    """Compose once per process what tests share, as Hydra takes a fifth of a second."""
    return compose_config([*TINY, *overrides])


def directory_of(config: Config, num_processes: int = 1) -> RunDirectory:
    """Return where a tiny run lives."""
    return run_directory(config, device_type(config.device), num_processes)


def lock_holder(path: Path) -> int:
    """Return the process that wrote a lock's file."""
    return int(path.read_text().split()[0])


def metrics_without_times(config: Config, num_processes: int = 1) -> list[dict[str, float]]:
    """Return the rows of metrics.csv but for the measured seconds, which differ from run to run."""
    return [_without_times(record) for record in read_records(directory_of(config, num_processes).metrics)]


def _without_times(record: EpochRecord) -> dict[str, float]:
    return {name: value for name, value in vars(record).items() if not name.endswith("_s")}
