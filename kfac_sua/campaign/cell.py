"""One run of a campaign: its configuration, its command, and what is on disk of it."""

import contextlib
import copy
import dataclasses
import functools
import shlex
from collections.abc import Iterable, Sequence
from enum import StrEnum
from pathlib import Path

from kfac_sua.checks import check
from kfac_sua.compose import compose_config
from kfac_sua.config import Config, ConfigError, KroneckerConfig
from kfac_sua.device import device_type
from kfac_sua.files.lock import RunBusyError, exclusive
from kfac_sua.runs.directory import RunDirectory, run_directory
from kfac_sua.runs.metrics import EpochRecord, read_ended_records, read_records
from kfac_sua.runs.run_info import ENDED, UNENDED, RecordError, RunInfo, read_run_info, write_run_info


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
    def curve(self) -> tuple[str, str]:
        """Panel and method."""
        return self.panel, self.method

    @property
    def name(self) -> str:
        """What progress and errors call it, such as ``grid vgg11/sua lr=0.03 damping=0.1 seed=0``."""
        config = self.config
        damping = config.preconditioner.damping if isinstance(config.preconditioner, KroneckerConfig) else None
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
        status: ``missing`` before its first start, then as in run.json; ``failed`` also if its records are damaged.
        epochs: Completed epochs.
        failure: Why it failed, in one sentence.
    """

    status: str
    epochs: int
    failure: str | None = None

    @property
    def has_ended(self) -> bool:
        """Whether nothing of it is left to do."""
        return self.status in ENDED


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
    directory = run_directory(config, device_type(config.device))
    return Cell(stage, *curve, overrides, config, directory)


def each_once(cells: Iterable[Cell]) -> list[Cell]:
    """Return runs without repetitions: curves whose settings agree share a run, and so its directory."""
    return list({cell.directory.path: cell for cell in cells}.values())


def read_state(cell: Cell) -> CellState:
    """Return what is on disk of a run.

    A run whose records are damaged, or incomplete although it has finished, counts as failed. It is tried again, which
    says what to do about them, and the other runs of the campaign go on.
    """
    if not cell.directory.info.exists():
        return CellState("missing", 0)
    try:
        info = read_cell_info(cell)
        records = read_ended_records(cell.directory.metrics, info) if cell.directory.metrics.exists() else []
    except RecordError as error:
        return CellState("failed", 0, str(error))
    epochs = [record.epoch for record in records]
    if info.status == "finished" and epochs != list(range(cell.config.epochs + 1)):
        reason = (
            f"{cell.directory.info} says that the run has finished, but metrics.csv lacks epochs; move "
            f"{cell.directory.path} away, and the same command carries it out again."
        )
        return CellState("failed", 0, reason)
    return CellState(info.status, epochs[-1] if epochs else 0, info.failure)


def sound_records(cell: Cell) -> list[EpochRecord]:
    """Return the epochs of a run, for display: none if there are none or they are damaged."""
    try:
        return read_records(cell.directory.metrics) if cell.directory.metrics.exists() else []
    except RecordError:  # ``read_state`` says so
        return []


def mark_failed(cell: Cell, reason: str) -> None:
    """Write into run.json that a run has failed, unless it has ended or a process holds it.

    Where run.json cannot be written, as on a full disk, the campaign's own output has the reason.

    Args:
        cell: The run, maybe one that has never started.
        reason: Why it failed, in one sentence.
    """
    if not cell.directory.info.exists():
        return
    with contextlib.suppress(OSError, RecordError, RunBusyError), exclusive(cell.directory.path):
        info = read_cell_info(cell)
        if info.status in UNENDED and info.failure != reason:
            write_run_info(cell.directory.info, dataclasses.replace(info, status="failed", failure=reason))


def read_cell_info(cell: Cell) -> RunInfo:
    """Return run.json of a run that has been started."""
    return read_run_info(cell.directory.info)


def log_path(cell: Cell) -> Path:
    """Return the file that holds what a run printed."""
    return run_log(cell.directory)


def run_log(directory: RunDirectory) -> Path:
    """Return the file that holds what the run of a directory printed."""
    return directory.path / "log.txt"


@functools.cache
def _composed(base: tuple[str, ...]) -> Config:
    """Compose once per curve, as Hydra takes a tenth of a second and the cells of a grid differ in two numbers."""
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
