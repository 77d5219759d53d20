"""From command-line overrides to checked configurations: one run, or every cell of a sweep."""

import copy
import dataclasses
import itertools
import math
import re
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from hydra import compose, version
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.config_loader import ConfigLoader
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep
from hydra.core.utils import JobRuntime
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from tqdm import tqdm

from kfac_sua.checks import check
from kfac_sua.config import CONFIG_DIR, CONFIG_NAME, VERSION_BASE, Config, ConfigError, settings_error
from kfac_sua.explain import all_keys, explain, explain_unknown_key, shown
from kfac_sua.hydra_settings import check_node, refuse_key
from kfac_sua.launchers import missing_plugin
from kfac_sua.tuned import resolve_auto

# Every cell of a sweep is composed before the first one runs; a typing error such as seed=range(1000000000) must not
# fill the memory first.
MAX_CELLS = 10_000

# More runs than this take so long to check, 0.1 s each, that a sweep says so.
_MANY_CELLS = 50

# Texts that Hydra reads as something else.
_WORDS = ("null", "true", "false", "nan", "inf")

# Hydra's state is that of the process.
_one_at_a_time = threading.RLock()

# Of Hydra's sweepers, the one that goes through a grid.
_GRID_SWEEPER = "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"

# Groups whose option fills a node of the configuration.
ONE_OPTION = ("model", "dataset", "preconditioner", "optimizer", "schedule")
# All that a command line chooses from.
GROUPS = (*ONE_OPTION, "experiment", "scale", "sweep", "hydra/launcher", "hydra/sweeper")


def compose_config(overrides: Sequence[str] = ()) -> Config:
    """Return the checked configuration of one run, as ``python -m kfac_sua.train <overrides>`` would use it.

    Args:
        overrides: Arguments such as ``"preconditioner=sua"`` and ``"optimizer.lr=0.1"``.

    Returns:
        The configuration.

    Raises:
        ConfigError: If the overrides cannot be composed or a check fails.
    """
    with _initialized_hydra():
        return to_config(_compose(overrides))


@dataclass(frozen=True)
class Cells:
    """All runs that a command line asks for.

    Attributes:
        configs: Their checked configurations, in Hydra's order; one for a single run.
        are_all: Whether these are the runs. A sweeper that optimises chooses values itself: ``configs`` then hold every
            combination of those that it chooses from, and of both ends of intervals.
        num_runs: How many runs there will be, where that is known.
    """

    configs: list[Config]
    are_all: bool
    num_runs: int | None


def compose_cells(overrides: Sequence[str], *, multirun: bool = False, config_dir: Path | None = None) -> Cells:
    """Return the checked configurations of all runs that a command line asks for.

    Hydra checks a sweep cell by cell, each when its turn comes, and writes files before the first; going through all
    of them beforehand means that a sweep with one bad cell does not start.

    Args:
        overrides: Arguments, with several values (``optimizer.lr=0.1,0.03``) where they are swept over.
        multirun: Whether ``-m`` was given; ``sweep=<grid>`` asks for the same by itself.
        config_dir: Directory with configurations of the user's own.

    Raises:
        ConfigError: If a cell cannot be composed or fails a check, or there is none.
    """
    with _initialized_hydra(config_dir):
        parsed = _parse(overrides)
        cells = _cells(parsed)
        hydra_config = _compose(cells[0], with_hydra=True).hydra
        check_node(hydra_config, _compose([], with_hydra=True).hydra if config_dir is not None else None)
        if not multirun and hydra_config.mode is not RunMode.MULTIRUN:
            _refuse_several_values(parsed)
            return Cells([to_config(_compose(overrides))], are_all=True, num_runs=1)
        params = hydra_config.sweeper.get("params") or {}
        axes = _parse([*(f"{key}={values}" for key, values in params.items()), *overrides])
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
        return Cells([to_config(_compose(cell)) for cell in shown_cells], is_grid, num_runs)


def check_overrides(overrides: Sequence[str], config_dir: Path | None = None) -> None:
    """Refuse what :func:`compose_cells` refuses before it composes anything: what a flag shows must be what would run.

    Args:
        overrides: Arguments.
        config_dir: Directory with configurations of the user's own.

    Raises:
        ConfigError: If one cannot be read, or is none of a setting.
    """
    with _initialized_hydra(config_dir):
        _parse(overrides)


def group_options(config_dir: Path | None = None) -> dict[str, list[str]]:
    """Return the options of every group that a command line chooses from.

    Args:
        config_dir: Directory with configurations of the user's own.
    """
    with _initialized_hydra(config_dir):
        loader = GlobalHydra.instance().config_loader()
        return {group: loader.get_group_options(group) for group in GROUPS}


def quoted(text: str) -> str:
    """Return a text as it stands in an override, so that Hydra reads it back whatever characters it has.

    Args:
        text: Such as a path.
    """
    if re.fullmatch(r"[A-Za-z_/][\w./-]*", text) and text.lower() not in _WORDS:
        return text
    escaped = re.sub(r"(\\*)'", r"\1\1\\'", text).replace("${", r"\${")
    return f"'{escaped}'"


@contextmanager
def composed_hydra(overrides: Sequence[str], own: Sequence[str] = ()) -> Iterator[tuple[DictConfig, ConfigLoader]]:
    """Compose a configuration together with Hydra's own node.

    Args:
        overrides: Arguments such as ``"hydra/launcher=slurm"`` and ``"hydra.launcher.partition=gpu"``.
        own: What this package adds, which may set any of Hydra's keys.

    Yields:
        The configuration, and what composes others from the same files, as a launcher does.

    Raises:
        ConfigError: If it cannot be composed, names code to run, or needs a plugin that is not installed.
    """
    with _initialized_hydra():
        _parse(overrides)
        yield _compose([*overrides, *own], with_hydra=True), GlobalHydra.instance().config_loader()


def to_config(raw: DictConfig) -> Config:
    """Convert a composed configuration to checked dataclasses, below which nothing sees a ``DictConfig``.

    Args:
        raw: What Hydra composed, without its own ``hydra`` node.

    Returns:
        The configuration.

    Raises:
        ConfigError: If a key was added or removed, a value is missing, or :func:`check` refuses one.
    """
    _refuse_changed_keys(raw, "")
    raw = copy.deepcopy(raw)
    try:
        resolve_auto(raw)
        config = OmegaConf.to_object(raw)
    except OmegaConfBaseException as error:
        raise ConfigError(explain(error)) from error
    except ValueError as error:  # from KroneckerSettings, which checks itself when made
        raise settings_error(error) from error
    assert isinstance(config, Config)
    check(config)
    return config


@contextmanager
def _initialized_hydra(config_dir: Path | None = None) -> Iterator[None]:
    """Have Hydra read the configurations, and leave it as it was: a program of the caller's may be Hydra's as well."""
    with _one_at_a_time, _hydra_of_our_own(config_dir):
        yield


@contextmanager
def _hydra_of_our_own(config_dir: Path | None) -> Iterator[None]:
    state, base, job = GlobalHydra.instance(), version.VersionBase.instance(), JobRuntime()
    before = state.hydra, base.version_base, job.conf
    path = create_config_search_path(str(CONFIG_DIR))
    if config_dir is not None:  # where Hydra's flag --config-dir puts it
        path.prepend("command-line", f"file://{config_dir.absolute()}", SearchPathQuery(provider="schema"))
    state.hydra, job.conf = None, OmegaConf.create()
    try:
        version.setbase(VERSION_BASE)
        Hydra.create_main_hydra2("train", path)
        yield
    finally:
        state.hydra, base.version_base, job.conf = before


def _compose(overrides: Sequence[str], *, with_hydra: bool = False) -> DictConfig:
    try:
        return compose(CONFIG_NAME, list(overrides), return_hydra_config=with_hydra)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{', '.join(_files_of_other_encodings())} is not in UTF-8 ({error.reason}).") from error
    except Exception as error:  # Hydra raises some two dozen types here, all caused by overrides or YAML files
        raise ConfigError(explain(error)) from error


def _files_of_other_encodings() -> Iterator[str]:
    """Yield the YAML files that cannot be read as UTF-8, which the error itself does not name."""
    for element in GlobalHydra.instance().config_loader().get_search_path().get_path():
        scheme, _, place = str(element.path).partition("://")
        for path in sorted(Path(place).rglob("*.yaml")) if scheme == "file" else ():
            try:
                path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                yield str(path)


def _parse(overrides: Sequence[str]) -> list[Override]:
    loader = GlobalHydra.instance().config_loader()
    try:
        parsed = OverridesParser.create(loader).parse_overrides(list(overrides))
    except HydraException as error:
        raise ConfigError(explain(error)) from error
    for override in parsed:
        _refuse_key(override)
        _refuse_option(override, loader.get_group_options(_key(override)))
    return parsed


def _key(override: Override) -> str:
    """Return the key of an override without what is to happen to it."""
    return str(override.get_key_element()).lstrip("+~")


def _refuse_key(override: Override) -> None:
    """Refuse what is not the key of a setting."""
    key = _key(override)
    if not key:
        raise ConfigError(f"{override.input_line} names no key; give key=value.")
    refuse_key(key, str(override.input_line))
    if key.startswith("hydra") and override.is_sweep_override():
        raise ConfigError(f"{override.input_line} has several values, but all runs of a sweep share one of Hydra's.")
    if key.endswith(".name"):
        group = key.removesuffix(".name")
        raise ConfigError(f"{key} comes with its file of configs/{group}; give {group}=… instead.")
    if key == "campaign":
        raise ConfigError(
            f"{override.input_line} is a campaign of many runs; give python -m kfac_sua.reproduce {override.value()}."
        )


def _refuse_option(override: Override, options: Sequence[str]) -> None:
    """Refuse what is not one option of a group, where the key is that of a group."""
    key = _key(override)
    # Hydra adds with + what the primary configuration leaves out; here it has every group and every key.
    if (override.is_add() and (options or key in all_keys())) or (override.is_force_add() and options):
        bare = str(override.input_line).lstrip("+")
        raise ConfigError(f"{override.input_line} adds what is there already; leave out the +: {bare}.")
    if key in ("hydra/launcher", "hydra/sweeper") and (sentence := missing_plugin(str(override.value()))):
        raise ConfigError(sentence)
    if key == "sweep" and (override.is_sweep_override() or isinstance(override.value(), list)):
        raise ConfigError(f"{override.input_line} names several grids; run them one after the other.")
    if not options or override.is_sweep_override():
        return
    # Hydra merges a list of options; of an experiment that makes sense, of a network or an optimizer it does not.
    admitted: tuple[type, ...] = (str,) if key in ONE_OPTION else (str, list)
    if not isinstance(override.value(), admitted) and not override.is_delete():
        raise ConfigError(f"{key} must be one of {', '.join(options)}, got {shown(override.value())}.")


def _cells(overrides: Sequence[Override]) -> list[list[str]]:
    """Return the overrides of every cell: the product of all swept values, where a later key replaces an earlier."""
    axes: dict[str, list[str]] = {}
    for override in overrides:
        if not override.is_sweep_override():
            axes[_key(override)] = [str(override.input_line)]
        elif override.is_discrete_sweep():
            values = [f"{override.get_key_element()}={value}" for value in _swept_values(override)]
            axes[_key(override)] = values
            if not values:
                raise ConfigError(f"{override.input_line} matches nothing, so there is no run to start.")
        else:  # an interval, of which a sweeper draws: both ends must be such that a run can have them
            ends = cast(IntervalSweep, override.value())
            axes[_key(override)] = [f"{override.get_key_element()}={end}" for end in (ends.start, ends.end)]
    if math.prod(map(len, axes.values())) > MAX_CELLS:
        raise ConfigError(f"The sweep has more than {MAX_CELLS} runs; split it into several.")
    return [list(cell) for cell in itertools.product(*axes.values())]


def _swept_values(override: Override) -> list[str]:
    """Return all values of an axis, which Hydra would otherwise go through however many there are."""
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


def _refuse_changed_keys(node: DictConfig, prefix: str) -> None:
    """Refuse keys that ``+key=value`` added or ``~key`` removed, which Hydra allows even with a schema."""
    kind = OmegaConf.get_type(node)
    if not dataclasses.is_dataclass(kind):
        return
    known = {field.name for field in dataclasses.fields(kind)}
    for key in map(str, node):
        if key not in known:
            raise ConfigError(explain_unknown_key(f"{prefix}{key}", kind))
        if not OmegaConf.is_missing(node, key) and isinstance(node._get_node(key), DictConfig):
            _refuse_changed_keys(node[key], f"{prefix}{key}.")
    for key in known - set(node):
        raise ConfigError(f"The key '{prefix}{key}' was removed but is needed; leave out '~{prefix}{key}'.")
