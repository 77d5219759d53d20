"""A sweep, ``python -m kfac_sua.train -m …``: the number of a run in it, what it returns, and the table of all runs."""

import math
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from kfac_sua.command_line import say
from kfac_sua.compose import Cells
from kfac_sua.config import Config, ConfigError, Objective, ProgressStyle
from kfac_sua.device import device_type
from kfac_sua.runs.directory import run_directory
from kfac_sua.runs.metrics import EpochRecord, read_records
from kfac_sua.runs.run_info import RecordError, RunInfo, read_run_info
from kfac_sua.streams import output_is_recorded

# The variable from which a run learns how many there are, in any process and on any machine of a launcher.
_NUM_RUNS = "KFAC_SUA_SWEEP_RUNS"


# Runs of a sweep that this process has carried out, in order.
_carried_out: list[Config] = []


def begin_in_sweep(config: Config) -> None:
    """Note a run of this process's sweep, since an optimising sweeper decides only on the way which runs there are.

    Args:
        config: The run's configuration.
    """
    if HydraConfig.get().mode is RunMode.MULTIRUN:
        _carried_out.append(config)


def sweep_overrides(overrides: Sequence[str], num_runs: int | None) -> list[str]:
    """Return overrides that a sweep adds: the number of its runs, and how much Hydra prints.

    Runs that this process carries out one after the other print their own number, and replace Hydra's lines, which
    count from 0. The jobs of a launcher print nothing here, and its lines stay.

    Args:
        overrides: Those of the command line.
        num_runs: Runs of the sweep; ``None`` if only its sweeper knows.
    """
    told = [f"+hydra.job.env_set.{_NUM_RUNS}={num_runs or 0}"]
    keys = [override.partition("=")[0] for override in overrides]
    if "hydra/launcher" not in keys:
        told.append("hydra.hydra_logging.root.level=WARNING")
    return told


def refuse_links(cells: Sequence[Config]) -> None:
    """Refuse links through which Hydra and its sweepers would write somewhere else.

    Args:
        cells: The configurations of all runs.

    Raises:
        ConfigError: If there is one; the output directory itself may be a link.
    """
    for output_dir in dict.fromkeys(cell.output_dir for cell in cells):
        sweep_dir = Path(output_dir) / ".sweep"
        for path in (sweep_dir, sweep_dir / "multirun.yaml", sweep_dir / "optimization_results.yaml"):
            if path.is_symlink():
                raise ConfigError(f"{path} is a symbolic link, through which Hydra would write elsewhere; remove it.")


def place_in_sweep(config: Config) -> str:
    """Return what the opening line of a run begins with: ``#3 of 10`` in a sweep, counted from 1, else nothing.

    Args:
        config: Its configuration, which may ask for silence.
    """
    if config.progress is ProgressStyle.none or HydraConfig.get().mode is not RunMode.MULTIRUN:
        return ""
    number, num_runs = int(HydraConfig.get().job.num) + 1, int(os.environ.get(_NUM_RUNS, 0))
    # A sweeper that draws its own values may carry out other numbers of runs than the command line tells.
    return f"#{number} of {num_runs} " if number <= num_runs else f"#{number} "


def objective_value(objective: Objective, info: RunInfo, records: Sequence[EpochRecord]) -> float:
    """Return the number by which a run is judged. The test set has no part in it.

    Args:
        objective: Which quantity.
        info: What run.json holds at the end.
        records: The rows of metrics.csv; row 0 is the untrained network.

    Returns:
        An error in [0, 1] or a loss in nats; infinity if the run has diverged.
    """
    if info.status != "finished":
        return math.inf
    if objective is Objective.best_val_error:
        return min(record.val_error for record in records[1:])
    last = records[-1]
    values = {
        Objective.final_val_error: last.val_error,
        Objective.final_val_loss: last.val_loss,
        Objective.train_loss: last.train_loss,
        Objective.train_eval_loss: last.train_eval_loss,
    }
    return values[objective]


def say_summary(cells: Cells | None) -> None:
    """Print the table of a sweep's runs, how many have failed or diverged, and the commands that show more.

    Args:
        cells: All its runs. For a single run, which has said itself how it ended, and for none, nothing is printed.
    """
    if cells is None or cells.num_runs == 1 or all(cell.progress is ProgressStyle.none for cell in cells.configs):
        return
    output_is_recorded()  # also where a launcher has carried out the runs elsewhere
    by_place: dict[str, list[Config]] = {}
    for cell in cells.configs if cells.are_all else _carried_out:
        by_place.setdefault(cell.output_dir, []).append(cell)
    for output_dir, there in by_place.items():
        _say_runs(Path(output_dir).absolute(), there, shows_best=not cells.are_all)
    if not by_place:  # a launcher has carried them out elsewhere
        _say_commands(Path(cells.configs[0].output_dir).absolute())


def _say_runs(root: Path, cells: Sequence[Config], *, shows_best: bool) -> None:
    """Print the table of some runs below one directory, and what shows more of it."""
    from kfac_sua.runs.collect import collect_directories, table_text  # pandas takes a second
    from kfac_sua.runs.final_table import CollectError

    found = {run_directory(cell, device_type(cell.device)).path.absolute(): cell for cell in cells}
    begun = [path for path in found if (path / "run.json").exists()]
    try:
        frame = collect_directories(root, begun)
        values = {path: _value(path, found[path]) for path in begun} if shows_best else {}
    except (CollectError, RecordError) as error:
        say(error)
        return
    counts = frame.drop_duplicates("run")["status"].value_counts().to_dict()
    counts["failed"] = counts.get("failed", 0) + len(found) - len(begun)  # before there was anything to write
    outcomes = [f"{counts[name]} {name}" for name in ("finished", "diverged", "failed", "running") if counts.get(name)]
    print(f"\n{len(found)} run{'s' if len(found) > 1 else ''}: {', '.join(outcomes)}.")
    if begun:
        print(table_text(frame))
        best = min(values, key=lambda path: values[path], default=None)
        if best is not None and values[best] < math.inf:
            print(f"Lowest {found[best].objective}, {values[best]:.4g}: {_shown(str(best))}")
        _say_commands(root)


def _value(path: Path, config: Config) -> float:
    """Return the number by which an optimising sweeper has judged a run."""
    info = read_run_info(path / "run.json")
    return objective_value(config.objective, info, read_records(path / "metrics.csv"))


def _say_commands(root: Path) -> None:
    python = _called("python", _shown(sys.executable))  # with `make` it lies below the working directory
    print(f"This table of all runs there: {python} -m kfac_sua.runs.collect {_shown(str(root))}")
    tensorboard = _called("tensorboard", f"{python} -m tensorboard.main")
    print(f"Their curves: {tensorboard} --logdir {_shown(str(root))}", flush=True)


def _called(name: str, otherwise: str) -> str:
    """Return the name of a program if the shell finds this environment's by it."""
    found = shutil.which(name)
    return name if found is not None and Path(found).parent == Path(sys.executable).parent else otherwise


def _shown(path: str) -> str:
    """Return a path as one types it: relative to the working directory if it lies below that."""
    return shlex.quote(os.path.relpath(path) if Path(path).is_relative_to(Path.cwd()) else path)
