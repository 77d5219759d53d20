"""The saved configuration of a run as overrides, so that it is composed and checked like any other."""

import copy
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from kfac_sua.compose import ONE_OPTION, quoted
from kfac_sua.config import ConfigError
from kfac_sua.runs.directory import ADDED_LATER


def saved_overrides(directory: Path) -> list[str]:
    """Return the overrides that compose the configuration in a run's ``config.yaml``.

    A key that came after the run has the value that says what the run did.

    Args:
        directory: The run's directory.

    Raises:
        ConfigError: If there is no such file, or it is not the configuration of a run.
    """
    path = directory / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"--rerun={directory} is not the directory of a run: it has no file config.yaml.")
    try:
        values = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except (OSError, UnicodeDecodeError, YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"Cannot read {path}: {str(error).rstrip('.')}.") from error
    return overrides_of(values, path)


def overrides_of(values: Any, source: object) -> list[str]:
    """Return the overrides that compose a configuration from its plain values.

    Args:
        values: As in config.yaml and run.json.
        source: From where they come, for a message.

    Raises:
        ConfigError: If it is not the configuration of a run.
    """
    if not isinstance(values, dict) or not all(isinstance(_name(values, group), str) for group in ONE_OPTION):
        raise ConfigError(f"{source} is not the configuration of a run: it must name {', '.join(ONE_OPTION)}.")
    values = copy.deepcopy(values)
    for node, key, value in ADDED_LATER:
        if node != "preconditioner" or values[node]["name"] != "baseline":
            (values[node] if node else values).setdefault(key, value)
    chosen = [f"{group}={_name(values, group)}" for group in ONE_OPTION]
    keys = [
        f"{node}.{key}={_written(value)}" if node else f"{key}={_written(value)}"
        for node, part in (("", values), *((group, values[group]) for group in ONE_OPTION))
        for key, value in part.items()
        if key not in ((*ONE_OPTION,) if node == "" else ("name",))
    ]
    return [*chosen, *keys]


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
