"""The training command: ``python -m kfac_sua.train preconditioner=sua model=vgg11``."""

if __name__ == "__main__":  # before the imports that take seconds
    from kfac_sua.startup import begin

    begin()

import contextlib
import os
import signal
import sys
import traceback
from collections.abc import Iterator

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode, TaskFunction
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from kfac_sua.checks import check_environment
from kfac_sua.cli.options import DEBUG, CommandLine, read_command_line
from kfac_sua.cli.sweep import (
    begin_in_sweep,
    objective_value,
    place_in_sweep,
    refuse_links,
    say_summary,
    sweep_overrides,
)
from kfac_sua.command_line import BAD_INPUT, FAILED, keep_command, say
from kfac_sua.compose import Cells, check_overrides, compose_cells, to_config
from kfac_sua.compose.explain import explain
from kfac_sua.compose.launchers import killed_sentence, was_killed
from kfac_sua.config import CONFIG_DIR, CONFIG_NAME, VERSION_BASE, ConfigError
from kfac_sua.data import DataError
from kfac_sua.files.lock import RunBusyError
from kfac_sua.files.openers import cannot_use
from kfac_sua.runs.directory import run_directory
from kfac_sua.runs.metrics import read_records
from kfac_sua.runs.run_info import RecordError
from kfac_sua.startup import run_command
from kfac_sua.streams import guard_streams, output_is_recorded
from kfac_sua.training.checkpoint import CheckpointError
from kfac_sua.training.connection import ConnectionLostError
from kfac_sua.training.launch import Invocation, Launch, read_launch
from kfac_sua.training.loop import run
from kfac_sua.training.process_group import OtherProcessError
from kfac_sua.tuned import auto_keys

# Errors that a user can cause. PyTorch and the preconditioner raise RuntimeError where something cannot be done (out of
# memory, a factor that is not positive definite). Any other exception is a bug and keeps its traceback.
INPUT_ERRORS = (ConfigError, DataError, HydraException, OmegaConfBaseException)
RUN_ERRORS = (
    *(RecordError, CheckpointError, RunBusyError, ConnectionLostError, OtherProcessError),
    *(OSError, MemoryError, RuntimeError),
)


class SweepCellError(Exception):
    """A run of a sweep that failed and has said why: on this process's stderr, or on that of a launcher's job.

    Args:
        sentence: Why.
        process: The process that said it.
    """

    def __init__(self, sentence: str, process: int) -> None:
        super().__init__(sentence, process)
        self._sentence, self._process = sentence, process

    def __str__(self) -> str:
        return self._sentence

    @property
    def is_said(self) -> bool:
        """Whether whoever reads this process's stderr has read it."""
        return self._process == os.getpid()


def main() -> int:
    """Carry out the command line and return the exit code.

    An error that a user can cause ends with one sentence on stderr; with ``--debug``, or ``HYDRA_FULL_ERROR=1`` in the
    environment, with a traceback.

    Returns:
        0 if every run finished or is recorded as diverged, 1 if one failed, 2 for bad input, 130 after Ctrl-C, 143
        after SIGTERM. Output that gets lost, as on a full disk, is no failure of a run.
    """
    keep_command("kfac_sua.train", sys.argv[1:])
    is_debug = DEBUG in sys.argv or os.environ.get("HYDRA_FULL_ERROR") == "1"
    with _raised_errors():
        try:
            return _with_hydra(train) if is_debug else _carry_out()
        except KeyboardInterrupt as interrupt:
            code = 128 + getattr(interrupt, "signal_number", signal.SIGINT)
            return code if _launch().rank else say(str(interrupt) or "interrupted.", code)


@contextlib.contextmanager
def _raised_errors() -> Iterator[None]:
    """Make Hydra raise its errors instead of printing them."""
    before = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    finally:
        del os.environ["HYDRA_FULL_ERROR"]
        if before is not None:
            os.environ["HYDRA_FULL_ERROR"] = before


def _carry_out() -> int:
    """Carry out the command line, print one sentence for an error of a user's, and return the exit code."""
    try:
        return _with_hydra(train_and_report)
    except SweepCellError as error:
        said = " as said above" if error.is_said else f", the first of them so: {str(error).rstrip('.')}"
        return say(f"Some runs of the sweep failed{said}; the same command starts only what is missing.")
    except INPUT_ERRORS as error:
        return _say_of_command(error)
    except OSError as error:  # Hydra's own files of a sweep; those of a run are reported where it ends
        return _say_of_command(error)
    except Exception as error:
        if was_killed(error):
            return say(killed_sentence(error))
        # A run raised it itself, and not Hydra before it, whose exceptions have any type.
        if any(frame.f_code is train_and_report.__code__ for frame, _ in traceback.walk_tb(error.__traceback__)):
            raise
        return say(f"Hydra cannot carry this out: {_one_line(error)}. (--debug shows where.)", BAD_INPUT)


def _with_hydra(task: TaskFunction) -> int:
    """Check the command line, before Hydra writes anything, and have Hydra carry it out."""
    line = read_command_line(sys.argv[1:])
    if line.answer is not None:
        print(line.answer(line), flush=True)
        return 0
    check_environment(os.environ)
    overrides, cells = _checked(line)
    sys.argv[1:] = line.for_hydra(overrides)
    try:
        hydra.main(version_base=VERSION_BASE, config_path=str(CONFIG_DIR), config_name=CONFIG_NAME)(task)()
    except SweepCellError:
        say_summary(cells)
        raise
    say_summary(cells)
    return 0


def _checked(line: CommandLine) -> tuple[list[str], Cells | None]:
    """Refuse bad configurations of any of the runs.

    Returns:
        The overrides, with those that a sweep adds; and all runs, or ``None`` where something is only shown.
    """
    overrides = line.all_overrides()
    if line.for_hydra_alone:
        if not line.is_completion:  # which goes by what is typed so far
            check_overrides(overrides, line.config_dir)
        return overrides, None
    launch = read_launch(os.environ)
    cells = compose_cells(overrides, multirun=line.is_multirun, config_dir=line.config_dir)
    refuse_links(cells.configs)
    if launch.world_size > 1 and cells.num_runs != 1:
        raise ConfigError(
            f"{cells.num_runs or 'Several'} runs by {launch.world_size} processes together: give torchrun one run, or "
            "start the sweep without it, whose runs a launcher can spread over machines."
        )
    return [*overrides, *(sweep_overrides(overrides, cells.num_runs) if cells.num_runs != 1 else [])], cells


def train(raw: DictConfig) -> float | None:
    """Carry out one run.

    Args:
        raw: The composed configuration.

    Returns:
        The number that an optimising sweeper minimises, from the main process of the run; None from the others.
    """
    guard_streams()  # a launcher's process has not begun with this file
    output_is_recorded()
    config, launch = to_config(raw), read_launch(os.environ)
    begin_in_sweep(config)
    invocation = Invocation(place_in_sweep(config), auto_keys(raw), tuple(HydraConfig.get().overrides.task))
    info = run(config, launch, invocation)
    if launch.rank > 0:
        return None
    directory = run_directory(config, info.device, launch.world_size)
    return objective_value(config.objective, info, read_records(directory.metrics))


def train_and_report(raw: DictConfig) -> float | None:
    """Carry out one run, and say in one sentence why it fails if it does.

    Args:
        raw: The composed configuration.

    Returns:
        What :func:`train` returns.

    Raises:
        SweepCellError: If a run of a sweep fails; Hydra goes on with the others and raises the first one at the end.
        SystemExit: If a single run fails.
    """
    try:
        return train(raw)
    except (*INPUT_ERRORS, *RUN_ERRORS) as error:
        code = _say_why(error)
        sentence = str(error)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # all is said and done; another one could only tear the report
        raise
    # Outside of the handler: Hydra keeps the error of every cell, and its context would keep the cell's network.
    if HydraConfig.get().mode is RunMode.MULTIRUN:
        raise SweepCellError(sentence, os.getpid())
    raise SystemExit(code)


def _say_why(error: BaseException) -> int:
    """Print why a run fails, unless another of its processes prints that, and return the exit code."""
    code, launch = _exit_code(error), _launch()
    if isinstance(error, OtherProcessError):
        return code
    names_process = launch.world_size > 1 and not isinstance(error, ConnectionLostError)
    prefix = f"process {launch.rank} of {launch.world_size}: " if names_process else ""
    return say(prefix + _sentence(error), code)


def _say_of_command(error: BaseException) -> int:
    """Print what is wrong with the command line, which all processes share, in one of them; return the exit code."""
    code = _exit_code(error)
    return code if _launch().rank else say(_sentence(error), code)


def _exit_code(error: BaseException) -> int:
    return BAD_INPUT if isinstance(error, INPUT_ERRORS) else FAILED


def _launch() -> Launch:
    """Return how this process was launched; as a single one if the environment makes no sense."""
    try:
        return read_launch(os.environ)
    except ConfigError:
        return Launch()


def _sentence(error: BaseException) -> str:
    """Return what went wrong, on one line."""
    if isinstance(error, HydraException | OmegaConfBaseException):
        return explain(error)
    if isinstance(error, OSError):
        return cannot_use(error)
    text = f"{_one_line(error)}."
    # RecordError and CheckpointError are not RuntimeErrors, and their sentences need no traceback.
    return f"{text} (--debug shows where.)" if isinstance(error, RuntimeError) else text


def _one_line(error: BaseException) -> str:
    """Return the message of an error without line breaks and full stop."""
    return " ".join(str(error).split()).removesuffix(".") or type(error).__name__


if __name__ == "__main__":
    run_command(main)
