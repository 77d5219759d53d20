"""All runs that a command line asks for: every cell of a sweep, composed and checked before the first one starts."""

import itertools
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep
from hydra.types import RunMode
from tqdm import tqdm

from kfac_sua.compose.composition import compose_raw, initialized_hydra, to_config
from kfac_sua.compose.hydra_settings import check_node
from kfac_sua.compose.overrides import key_of, parse
from kfac_sua.config import Config, ConfigError

# Every cell of a sweep is composed before the first one runs; a typing error such as seed=range(1000000000) must not
# fill the memory first.
MAX_CELLS = 10_000

# More runs than this take so long to check, 0.1 s each, that a sweep says so.
_MANY_CELLS = 50

# Of Hydra's sweepers, the one that goes through a grid.
_GRID_SWEEPER = "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"


@dataclass(frozen=True)
class Cells:
    """All runs that a command line asks for.

    Attributes:
        configs: Their checked configurations, in Hydra's order; one for a single run.
        are_all: Whether ``configs`` are exactly the runs. An optimising sweeper chooses values itself; ``configs`` then
            hold every combination of the values that it can choose, with both ends of each interval.
        num_runs: How many runs there will be, where that is known.
    """

    configs: list[Config]
    are_all: bool
    num_runs: int | None


def compose_cells(overrides: Sequence[str], *, multirun: bool = False, config_dir: Path | None = None) -> Cells:
    """Return the checked configurations of all runs that a command line asks for.

    Hydra checks each cell of a sweep only when its turn comes, and writes files before the first. Here all cells are
    checked beforehand, so that a sweep with one bad cell does not start.

    Args:
        overrides: Arguments, with several values (``optimizer.lr=0.1,0.03``) where they are swept over.
        multirun: Whether ``-m`` was given; ``sweep=<grid>`` asks for the same by itself.
        config_dir: Directory with configurations of the user's own.

    Raises:
        ConfigError: If a cell cannot be composed or fails a check, or there is none.
    """
    with initialized_hydra(config_dir):
        parsed = parse(overrides)
        cells = _cells(parsed)
        hydra_config = compose_raw(cells[0], with_hydra=True).hydra
        check_node(hydra_config, compose_raw([], with_hydra=True).hydra if config_dir is not None else None)
        if not multirun and hydra_config.mode is not RunMode.MULTIRUN:
            _refuse_several_values(parsed)
            return Cells([to_config(compose_raw(overrides))], are_all=True, num_runs=1)
        params = hydra_config.sweeper.get("params") or {}
        axes = parse([*(f"{key}={values}" for key, values in params.items()), *overrides])
        is_grid = hydra_config.sweeper._target_ == _GRID_SWEEPER
        for override in axes:
            if is_grid and override.is_sweep_override() and not override.is_discrete_sweep():
                raise ConfigError(
                    f"{override.input_line} is an interval, for a sweeper that optimises; give such a sweeper "
                    "(sweep=optuna_lr_damping), or values such as 0.1,0.03."
                )
        cells = _cells(axes)
        if len(cells) > _MANY_CELLS and not sys.stderr.isatty():
            print(f"checking the configurations of {len(cells)} runs", file=sys.stderr, flush=True)
        shown_cells = tqdm(cells, "checking configurations", unit="run", delay=1, leave=False, disable=None)
        num_runs = len(cells) if is_grid else hydra_config.sweeper.get("n_trials")
        return Cells([to_config(compose_raw(cell)) for cell in shown_cells], is_grid, num_runs)


def check_overrides(overrides: Sequence[str], config_dir: Path | None = None) -> None:
    """Refuse the overrides that :func:`compose_cells` refuses, for options that only show what would run.

    Args:
        overrides: Arguments.
        config_dir: Directory with configurations of the user's own.

    Raises:
        ConfigError: If one cannot be read, or its key is not that of a setting.
    """
    with initialized_hydra(config_dir):
        parse(overrides)


def _cells(overrides: Sequence[Override]) -> list[list[str]]:
    """Return the overrides of every cell: the product of all swept values, where a later key replaces an earlier."""
    axes: dict[str, list[str]] = {}
    for override in overrides:
        if not override.is_sweep_override():
            axes[key_of(override)] = [str(override.input_line)]
        elif override.is_discrete_sweep():
            values = [f"{override.get_key_element()}={value}" for value in _swept_values(override)]
            axes[key_of(override)] = values
            if not values:
                raise ConfigError(f"{override.input_line} matches nothing, so there is no run to start.")
        else:  # an interval, from which a sweeper draws: a run must be possible at both of its ends
            ends = cast(IntervalSweep, override.value())
            axes[key_of(override)] = [f"{override.get_key_element()}={end}" for end in (ends.start, ends.end)]
    if math.prod(map(len, axes.values())) > MAX_CELLS:
        raise ConfigError(f"The sweep has more than {MAX_CELLS} runs; split it into several.")
    return [list(cell) for cell in itertools.product(*axes.values())]


def _swept_values(override: Override) -> list[str]:
    """Return all values of an axis, but refuse a range that is too long: Hydra would list all of its values."""
    sweep = override.value()
    if isinstance(sweep, RangeSweep):
        start, stop, step = (float(value or 0) for value in (sweep.start, sweep.stop, sweep.step))
        if step == 0 or not all(map(math.isfinite, (start, stop, step))):
            raise ConfigError(f"{override.input_line} is no range; give range(start,stop,step) with a step ≠ 0.")
        if (stop - start) / step > MAX_CELLS:
            raise ConfigError(f"{override.input_line} has more than {MAX_CELLS} values; split the sweep into several.")
    return list(override.sweep_string_iterator())


def _refuse_several_values(overrides: Sequence[Override]) -> None:
    for override in overrides:
        if override.is_sweep_override():
            raise ConfigError(
                f"{override.input_line} has several values; add -m to run them all, or write a list as key=[a,b]."
            )
