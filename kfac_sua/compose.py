"""From command-line overrides to checked configurations: one run, or every cell of a sweep."""

import copy
import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from hydra import compose, initialize_config_dir
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, RangeSweep
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from kfac_sua.checks import check
from kfac_sua.config import CONFIG_DIR, CONFIG_NAME, VERSION_BASE, Config, ConfigError, settings_error
from kfac_sua.explain import explain, explain_unknown_key, shown
from kfac_sua.launchers import missing_plugin
from kfac_sua.tuned import resolve_auto

# Every cell of a sweep is composed before the first one runs; a typing error such as seed=range(1000000000) must not
# fill the memory first.
MAX_CELLS = 10_000

# The key by which Hydra takes a value for the name of something to call.
_CODE = "_target_"

# Groups whose option fills a node of the configuration.
_ONE_OPTION = ("model", "dataset", "preconditioner", "optimizer", "schedule")


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


def compose_cells(overrides: Sequence[str], *, multirun: bool = False) -> list[Config]:
    """Return the checked configurations of all runs that a command line asks for.

    Hydra checks a sweep cell by cell, each when its turn comes, and writes files before the first; going through all
    of them beforehand means that a sweep with one bad cell does not start.

    Args:
        overrides: Arguments, with several values (``optimizer.lr=0.1,0.03``) where they are swept over.
        multirun: Whether ``-m`` was given; ``sweep=<grid>`` asks for the same by itself.

    Returns:
        One configuration for a single run; for a sweep, one per cell, in Hydra's order.

    Raises:
        ConfigError: If a cell cannot be composed or fails a check, or there is none.
    """
    with _initialized_hydra():
        parsed = _parse(overrides)
        cells = _cells(parsed)
        hydra_config = _compose(cells[0], with_hydra=True).hydra
        if not multirun and hydra_config.mode is not RunMode.MULTIRUN:
            _refuse_several_values(parsed)
            return [to_config(_compose(overrides))]
        params = hydra_config.sweeper.get("params") or {}
        cells = _cells(_parse([*(f"{key}={values}" for key, values in params.items()), *overrides]))
        return [to_config(_compose(cell)) for cell in cells]


@contextmanager
def composed_hydra(overrides: Sequence[str]) -> Iterator[tuple[DictConfig, ConfigLoader]]:
    """Compose a configuration together with Hydra's own node.

    Args:
        overrides: Arguments such as ``"hydra/launcher=slurm"`` and ``"hydra.launcher.partition=gpu"``.

    Yields:
        The configuration, and what composes others from the same files, as a launcher does.

    Raises:
        ConfigError: If it cannot be composed, names code to run, or needs a plugin that is not installed.
    """
    with _initialized_hydra():
        _parse(overrides)
        yield _compose(overrides, with_hydra=True), GlobalHydra.instance().config_loader()


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
def _initialized_hydra() -> Iterator[None]:
    with initialize_config_dir(version_base=VERSION_BASE, config_dir=str(CONFIG_DIR), job_name="train"):
        yield


def _compose(overrides: Sequence[str], *, with_hydra: bool = False) -> DictConfig:
    try:
        return compose(CONFIG_NAME, list(overrides), return_hydra_config=with_hydra)
    except Exception as error:  # Hydra raises some two dozen types here, all caused by overrides or YAML files
        raise ConfigError(explain(error)) from error


def _parse(overrides: Sequence[str]) -> list[Override]:
    loader = GlobalHydra.instance().config_loader()
    try:
        parsed = OverridesParser.create(loader).parse_overrides(list(overrides))
    except HydraException as error:
        raise ConfigError(explain(error)) from error
    for override in parsed:
        _refuse_key(override)
        _refuse_option(override, loader.get_group_options(override.get_key_element()))
    return parsed


def _refuse_key(override: Override) -> None:
    """Refuse what is not the key of a setting."""
    key = override.get_key_element()
    if not key:
        raise ConfigError(f"{override.input_line} names no key; give key=value.")
    if _CODE in key.split(".") or (key.startswith("hydra.launcher") and _CODE in str(override.input_line)):
        raise ConfigError(f"{key} names code to run, which no setting does; leave it out.")
    if key.endswith(".name"):
        group = key.removesuffix(".name")
        raise ConfigError(f"{key} comes with its file of configs/{group}; give {group}=… instead.")


def _refuse_option(override: Override, options: Sequence[str]) -> None:
    """Refuse what is not one option of a group, where the key is that of a group."""
    key = override.get_key_element()
    if key == "hydra/launcher" and not override.is_sweep_override():
        _refuse_missing_plugin(str(override.value()))
    if key == "sweep" and (override.is_sweep_override() or isinstance(override.value(), list)):
        raise ConfigError(f"{override.input_line} names several grids; run them one after the other.")
    if not options or override.is_sweep_override():
        return
    # Hydra merges a list of options; of an experiment that makes sense, of a network or an optimizer it does not.
    admitted: tuple[type, ...] = (str,) if key in _ONE_OPTION else (str, list)
    if not isinstance(override.value(), admitted) and not override.is_delete():
        raise ConfigError(f"{key} must be one of {', '.join(options)}, got {shown(override.value())}.")


def _refuse_missing_plugin(launcher: str) -> None:
    sentence = missing_plugin(launcher)
    if sentence:
        raise ConfigError(sentence)


def _cells(overrides: Sequence[Override]) -> list[list[str]]:
    """Return the overrides of every cell: the product of all swept values, where a later key replaces an earlier."""
    axes: dict[str, list[str]] = {}
    for override in overrides:
        if not override.is_sweep_override():
            axes[override.get_key_element()] = [str(override.input_line)]
        elif override.is_discrete_sweep():
            key = override.get_key_element()
            axes[key] = [f"{key}={value}" for value in _swept_values(override)]
            if not axes[key]:
                raise ConfigError(f"{override.input_line} matches nothing, so there is no run to start.")
        # An interval is drawn from by a sweeper of the user's choice, which no one can check beforehand.
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
