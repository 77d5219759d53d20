"""The saved configuration of a run as overrides, so that it is composed and checked like any other."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from kfac_sua.compose.composition import compose_config
from kfac_sua.compose.overrides import ONE_OPTION, quoted
from kfac_sua.config import Config, ConfigError, PreconditionerConfig
from kfac_sua.methods import BASELINE
from kfac_sua.preconditioner.registry import structure_class
from kfac_sua.runs.directory import with_later_keys


def saved_overrides(directory: Path, given: Sequence[str] = ()) -> list[str]:
    """Return the overrides that compose the configuration in a run's ``config.yaml``, with others on top.

    A key that is newer than the run gets the value under which the run was made. Where the others choose an option of
    a group, such as ``preconditioner=kfac``, the keys are those of the option and not the saved ones.

    Args:
        directory: The run's directory.
        given: The other overrides.

    Returns:
        All of them, the given ones last.

    Raises:
        ConfigError: If there is no such file, it is not the configuration of a run, its structure is not installed, or
            one of the others names a file of keys, over which the saved keys would win.
    """
    keys = {override.lstrip("+~").partition("=")[0]: override for override in given}
    for group in ("experiment", "scale", "sweep"):
        if group in keys:
            raise ConfigError(
                f"{keys[group]} would be passed over, as the saved configuration of {directory} has every key; give "
                "keys instead, several values with -m, or leave out --rerun and --start-from."
            )
    path = directory / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"--rerun={directory} is not the directory of a run: it has no file config.yaml.")
    try:
        values = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except (OSError, UnicodeDecodeError, YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"Cannot read {path}: {str(error).rstrip('.')}.") from error
    saved = overrides_of(values, path)
    if "preconditioner" not in keys and (why := _why_no_structure(values)):
        raise ConfigError(
            f"The structure of {directory} comes from a package that cannot be used here ({why.rstrip('.')}); install "
            f"it, or give another preconditioner, such as preconditioner=kfac."
        )
    return [
        *(one for one in saved if not one.startswith(tuple(f"{group}." for group in ONE_OPTION if group in keys))),
        *given,
    ]


def config_of(values: Any, source: object) -> Config:
    """Return the configuration of a run from its plain values, for what needs no more than its network and its data.

    Args:
        values: As in config.yaml and run.json.
        source: Where they come from, for messages.

    Returns:
        The checked configuration, without ``start_from``, as that run may be gone. Where the structure is that of a
        package which is not installed here, or cannot be imported, its ``preconditioner`` has its name alone.

    Raises:
        ConfigError: If it is not the configuration of a run, or a check fails.
    """
    overrides = overrides_of(values | {"start_from": None}, source)
    if _why_no_structure(values) is None:
        return compose_config(overrides)
    config = compose_config(overrides_of(values | {"start_from": None, "preconditioner": {"name": BASELINE}}, source))
    return dataclasses.replace(config, preconditioner=PreconditionerConfig(name=values["preconditioner"]["name"]))


def overrides_of(values: Any, source: object) -> list[str]:
    """Return the overrides that compose a configuration from its plain values.

    Args:
        values: As in config.yaml and run.json.
        source: Where they come from, for messages.

    Raises:
        ConfigError: If it is not the configuration of a run.
    """
    if not isinstance(values, dict) or not all(isinstance(_name(values, group), str) for group in ONE_OPTION):
        raise ConfigError(f"{source} is not the configuration of a run: it must name {', '.join(ONE_OPTION)}.")
    values = with_later_keys(values)
    chosen = [f"{group}={_name(values, group)}" for group in ONE_OPTION]
    keys = [
        f"{node}.{key}={_written(value)}" if node else f"{key}={_written(value)}"
        for node, part in (("", values), *((group, values[group]) for group in ONE_OPTION))
        for key, value in part.items()
        if key not in ((*ONE_OPTION,) if node == "" else ("name",))
    ]
    return [*chosen, *keys]


def _why_no_structure(values: Any) -> str | None:
    """Return why the structure of a configuration cannot be had; ``None`` if it can, or there is none."""
    structure = values["preconditioner"].get("structure")
    if structure is None:
        return None
    try:
        structure_class(structure)
    except ValueError as error:
        return str(error)
    return None


def _name(values: Any, group: str) -> Any:
    """Return which option of a group a configuration has, None if it does not say."""
    return values[group].get("name") if isinstance(values.get(group), dict) else None


def _written(value: Any) -> str:
    """Return a value as it stands in an override."""
    if isinstance(value, list):
        return f"[{','.join(map(_written, value))}]"
    if isinstance(value, str):
        return quoted(value)
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
