"""Overrides such as ``optimizer.lr=0.1``: how they are read and written, and which of Hydra's are refused."""

import re
from collections.abc import Sequence

from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from kfac_sua.compose.explain import all_keys, explain
from kfac_sua.compose.hydra_settings import refuse_key
from kfac_sua.compose.launchers import missing_plugin
from kfac_sua.config import ConfigError, shown

# Groups whose chosen option becomes a node of the configuration, so that there can be only one.
ONE_OPTION = ("model", "dataset", "preconditioner", "optimizer", "schedule")
# All groups that a command line chooses an option of.
GROUPS = (*ONE_OPTION, "experiment", "scale", "sweep", "hydra/launcher", "hydra/sweeper")
# Hydra reads these texts as other values.
_WORDS = ("null", "true", "false", "nan", "inf")


def quoted(text: str) -> str:
    """Return a text as it must be written in an override for Hydra to read it back, whatever its characters.

    Args:
        text: Such as a path.
    """
    if re.fullmatch(r"[A-Za-z_/][\w./-]*", text) and text.lower() not in _WORDS:
        return text
    escaped = re.sub(r"(\\*)'", r"\1\1\\'", text).replace("${", r"\${")
    return f"'{escaped}'"


def parse(overrides: Sequence[str]) -> list[Override]:
    """Read overrides as Hydra does; to be called while Hydra is initialized.

    Args:
        overrides: Arguments, with one value or several.

    Raises:
        ConfigError: If one cannot be read, or its key or its option of a group is none of this command's.
    """
    loader = GlobalHydra.instance().config_loader()
    try:
        parsed = OverridesParser.create(loader).parse_overrides(list(overrides))
    except HydraException as error:
        raise ConfigError(explain(error)) from error
    for override in parsed:
        _refuse_key(override)
        _refuse_option(override, loader.get_group_options(key_of(override)))
    return parsed


def key_of(override: Override) -> str:
    """Return the key of an override without ``+`` and ``~``, which say that it adds or removes the key."""
    return str(override.get_key_element()).lstrip("+~")


def _refuse_key(override: Override) -> None:
    """Refuse an override whose key is no setting's."""
    key = key_of(override)
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
    """Refuse an override that chooses no option, or several, where its key is a group."""
    key = key_of(override)
    # In Hydra + adds what the primary configuration lacks. This one lacks no group and no key.
    if (override.is_add() and (options or key in all_keys())) or (override.is_force_add() and options):
        bare = str(override.input_line).lstrip("+")
        raise ConfigError(f"{override.input_line} adds what is there already; leave out the +: {bare}.")
    if key in ("hydra/launcher", "hydra/sweeper") and (sentence := missing_plugin(str(override.value()))):
        raise ConfigError(sentence)
    if key == "sweep" and (override.is_sweep_override() or isinstance(override.value(), list)):
        raise ConfigError(f"{override.input_line} names several grids; run them one after the other.")
    if not options or override.is_sweep_override():
        return
    # Hydra merges a list of options. Experiments can be merged; networks or optimizers cannot.
    admitted: tuple[type, ...] = (str,) if key in ONE_OPTION else (str, list)
    if not isinstance(override.value(), admitted) and not override.is_delete():
        raise ConfigError(f"{key} must be one of {', '.join(options)}, got {shown(override.value())}.")
