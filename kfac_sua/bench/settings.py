"""The settings to measure: one configuration for each item such as ``kfac:damping=0.3``, with overrides for all."""

import dataclasses
import difflib
import re
from collections.abc import Mapping, Sequence

from kfac_sua.compose import compose_config
from kfac_sua.config import Config, ConfigError, KroneckerConfig, PreconditionerName
from kfac_sua.device import choose_device
from kfac_sua.preconditioner import structure_names

BASELINE = PreconditionerName.baseline.value
DEFAULT_SETTINGS = tuple(name.value for name in PreconditionerName)
PERIOD_KEY = "preconditioner.inverse_period"


@dataclasses.dataclass(frozen=True)
class Setting:
    """One column of the comparison.

    Args:
        name: What it is called in tables and files: its item of ``--settings``, and the channels per group where the
            width has scaled them, so that nothing is compared with a measurement of other groups.
        config: Its configuration.
    """

    name: str
    config: Config


@dataclasses.dataclass(frozen=True)
class Item:
    """An item of ``--settings``, taken apart.

    Args:
        text: The item.
        group: Name of the preconditioner.
        keys: ``key=value`` each, the keys those of the preconditioner group.
    """

    text: str
    group: str
    keys: list[str]


def parse_items(items: Sequence[str], option: str = "--settings") -> list[Item]:
    """Take ``NAME`` or ``NAME:key=value[,key=value...]`` apart, without composing anything yet.

    Args:
        items: As they stand on the command line.
        option: Their option, for messages.

    Raises:
        ConfigError: If an item names no setting, names one twice, or its keys are not written like that.
    """
    for text in items:
        if items.count(text) > 1:
            raise ConfigError(f"{option} names {text} twice; give each setting once.")
    return [_parse(text, option) for text in items]


def compose_settings(items: Sequence[Item], overrides: Sequence[str], options: Mapping[str, object]) -> list[Setting]:
    """Return the settings to measure, plain SGD first.

    Args:
        items: What to measure beside plain SGD, which may be among them.
        overrides: Further ``key=value``, for all settings; those of the preconditioner for all but plain SGD.
        options: Values of keys that the overrides do not give; ``None`` changes nothing.

    Returns:
        One configuration per setting; they differ in the preconditioner alone.

    Raises:
        ConfigError: If a configuration is refused.
    """
    shared = _with_options(overrides, options)
    common = [text for text in shared if not text.startswith("preconditioner.")]
    for_kronecker = [text for text in shared if text.startswith("preconditioner.")]
    settings = [Setting(BASELINE, compose_config([*common, f"preconditioner={BASELINE}"]))]
    for item in items:
        if item.group != BASELINE:
            own = [f"preconditioner={item.group}", *for_kronecker, *(f"preconditioner.{key}" for key in item.keys)]
            config = compose_config([*common, *own])
            settings.append(Setting(f"{item.text}{_scaled_groups(config)}", config))
    return settings


def _scaled_groups(config: Config) -> str:
    """Return the channels per group in brackets, where they are others than ``group_size``; else nothing."""
    assert isinstance(config.preconditioner, KroneckerConfig)
    size = config.preconditioner.channels_per_group(config.model.width)
    return "" if size == config.preconditioner.group_size else f" (groups of {size})"


def base_config(overrides: Sequence[str], options: Mapping[str, object]) -> Config:
    """Return the configuration that all preconditioned settings start from, before keys of their own.

    Raises:
        ConfigError: If it is refused, or the overrides choose a preconditioner.
    """
    for text in overrides:
        if text.partition("=")[0] == "preconditioner":
            raise ConfigError(f"{text} chooses a setting; give --settings {text.partition('=')[2] or 'sua'} instead.")
    return compose_config([*_with_options(overrides, options), "preconditioner=sua"])


def common_period(base: Config) -> int:
    """Return the mini-batches between refreshes in settings without an ``inverse_period`` of their own."""
    assert isinstance(base.preconditioner, KroneckerConfig)
    return base.preconditioner.inverse_period


def cpu_threads(base: Config) -> int | None:
    """Return the number of threads to measure with: one on a CPU, unless the configuration has another."""
    if base.num_threads is None and choose_device(base.device).type == "cpu":
        return 1
    return base.num_threads


def _with_options(overrides: Sequence[str], options: Mapping[str, object]) -> list[str]:
    given = {text.partition("=")[0] for text in overrides}
    defaults = [f"{key}={value}" for key, value in options.items() if value is not None and key not in given]
    return [*defaults, *overrides]


def _parse(text: str, option: str) -> Item:
    """Split ``NAME:key=value,key=value``; a comma inside a value, as in ``skip=[a,b]``, ends no pair."""
    name, colon, rest = text.partition(":")
    if name == BASELINE and colon:
        raise ConfigError(f"{option} {text!r}: plain SGD has no keys of its own; give {BASELINE} alone.")
    known = list(dict.fromkeys((*DEFAULT_SETTINGS, *structure_names())))
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        guess = f"; did you mean {close[0]}?" if close else "."
        raise ConfigError(f"{option} must name {', '.join(known)}, got {name!r}{guess}")
    keys = re.split(r",(?=[\w.]+=)", rest) if colon else []
    for key in keys:
        if not re.match(r"[\w.]+=", key) or "," in re.sub(r"\[.*?\]|'.*?'", "", key):
            raise ConfigError(f"{option} {text!r}: write keys as {name}:key=value,key=value, got {key!r}.")
    return Item(text, name, keys)
