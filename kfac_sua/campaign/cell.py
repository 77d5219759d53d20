"""One run of a campaign: its configuration, its command, and what is on disk of it."""

import copy
import dataclasses
import functools
import shlex
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path

from kfac_sua.build import choose_device
from kfac_sua.checks import check
from kfac_sua.compose import compose_config
from kfac_sua.config import Config, ConfigError, KroneckerConfig
from kfac_sua.runs.directory import RunDirectory, run_directory
from kfac_sua.runs.record import RecordError, RunInfo, read_records, read_run_info


class Stage(StrEnum):
    """What a run is for."""

    grid = "grid"
    final = "final"


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run.

    Attributes:
        stage: What it is for.
        panel: Panel of its curve.
        method: Method of its curve.
        overrides: Arguments that give its configuration to ``python -m kfac_sua.train``.
        config: The configuration.
        directory: Where it lies.
    """

    stage: Stage
    panel: str
    method: str
    overrides: tuple[str, ...]
    config: Config
    directory: RunDirectory

    @property
    def name(self) -> str:
        """What progress and errors call it, such as ``grid vgg11/sua lr=0.03 damping=0.1 seed=0``."""
        config = self.config
        damping = _damping(config)
        shown = "" if damping is None else f" damping={damping:g}"
        return f"{self.stage} {self.panel}/{self.method} lr={config.optimizer.lr:g}{shown} seed={config.seed}"

    @property
    def command(self) -> str:
        """The command that carries out this run alone."""
        return shlex.join(["python", "-m", "kfac_sua.train", *self.overrides])


@dataclasses.dataclass(frozen=True)
class CellState:
    """What is on disk of a run.

    Attributes:
        status: ``missing`` before its first start, then as in run.json.
        epochs: Completed epochs.
    """

    status: str
    epochs: int

    @property
    def has_ended(self) -> bool:
        """Whether nothing of it is left to do."""
        return self.status in ("finished", "diverged")


def make_cell(
    stage: Stage, curve: tuple[str, str], base: Sequence[str], *, lr: float, damping: float | None, seed: int
) -> Cell:
    """Return the run of a curve at one point of its grid.

    Args:
        stage: What it is for.
        curve: Panel and method.
        base: Overrides of the curve and the scale.
        lr: Learning rate.
        damping: Damping; None for a method without.
        seed: Seed.

    Raises:
        ConfigError: If the overrides do not give a valid configuration, or the method has no such damping.
    """
    values = {"optimizer.lr": repr(lr), "seed": str(seed)}
    if damping is not None:
        values["preconditioner.damping"] = repr(damping)
    overrides = (*base, *(f"{key}={value}" for key, value in values.items()))
    config = copy.deepcopy(_composed(tuple(base)))
    config.optimizer.lr, config.seed = lr, seed
    _set_damping(config, damping)
    check(config)
    directory = run_directory(config, choose_device(config.device).type)
    return Cell(stage, *curve, overrides, config, directory)


def read_state(cell: Cell) -> CellState:
    """Return what is on disk of a run.

    Raises:
        RecordError: If its records are damaged, or incomplete although it has finished.
    """
    if not cell.directory.info.exists():
        return CellState("missing", 0)
    records = read_records(cell.directory.metrics) if cell.directory.metrics.exists() else []
    epochs = [record.epoch for record in records]
    status = read_cell_info(cell).status
    if status == "finished" and epochs != list(range(cell.config.epochs + 1)):
        raise RecordError(
            f"{cell.directory.info} says that the run has finished, but metrics.csv lacks epochs; move "
            f"{cell.directory.path} away, and the same command carries it out again."
        )
    return CellState(status, epochs[-1] if epochs else 0)


def read_cell_info(cell: Cell) -> RunInfo:
    """Return run.json of a run that has been started."""
    return read_run_info(cell.directory.info)


def log_path(cell: Cell) -> Path:
    """Return the file that holds what a run printed."""
    return cell.directory.path / "log.txt"


@functools.cache
def _composed(base: tuple[str, ...]) -> Config:
    """Compose once per curve: Hydra takes a tenth of a second, and the cells of a grid differ in two numbers."""
    return compose_config(base)


def _set_damping(config: Config, damping: float | None) -> None:
    preconditioner = config.preconditioner
    if isinstance(preconditioner, KroneckerConfig) != (damping is not None):
        there_is, grid = ("a", "without one") if damping is None else ("no", "over one")
        raise ConfigError(
            f"preconditioner={preconditioner.name} has {there_is} damping, but its grid is {grid}; give another tuning."
        )
    if isinstance(preconditioner, KroneckerConfig) and damping is not None:
        preconditioner.damping = damping


def _damping(config: Config) -> float | None:
    return config.preconditioner.damping if isinstance(config.preconditioner, KroneckerConfig) else None
