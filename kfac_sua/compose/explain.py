"""Hydra's and OmegaConf's errors in one sentence that names the key, the value and the choices."""

import dataclasses
import difflib
import re
import types
from collections.abc import Iterator, Mapping
from enum import Enum
from typing import Any, Union, get_args, get_origin, get_type_hints

from hydra.errors import MissingConfigException, OverrideParseException
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, MissingMandatoryValue, ValidationError

from kfac_sua.compose.launchers import missing_plugin
from kfac_sua.config import (
    MODEL_TYPES,
    OPTIMIZER_TYPES,
    Config,
    KroneckerConfig,
    ModelConfig,
    OptimizerConfig,
    PreconditionerConfig,
    ScheduleConfig,
    StepScheduleConfig,
    shown,
)


def _options(group: str, types_of_names: Mapping[Any, type]) -> dict[type, str]:
    """Return for each type what a user types to get it: ``model=vgg11 or tiny``."""
    names: dict[type, list[str]] = {}
    for name, kind in types_of_names.items():
        names.setdefault(kind, []).append(str(name))
    return {kind: f"{group}={' or '.join(of_kind)}" for kind, of_kind in names.items()}


# Options of one group that differ in their keys: the type of the node -> what the user typed to get it.
OPTION_OF_TYPE: dict[type, str] = {
    **_options("model", MODEL_TYPES),
    PreconditionerConfig: "preconditioner=baseline",
    **_options("optimizer", OPTIMIZER_TYPES),
    ScheduleConfig: "schedule=constant or cosine",
    StepScheduleConfig: "schedule=step",
}
# Type of a group -> the types that its node may have. Suggestions look at all of them: a key may be another option's.
TYPES_OF_GROUP: dict[type, tuple[type, ...]] = {
    ModelConfig: tuple(dict.fromkeys(MODEL_TYPES.values())),
    PreconditionerConfig: (KroneckerConfig,),
    OptimizerConfig: tuple(OPTIMIZER_TYPES.values()),
    ScheduleConfig: (StepScheduleConfig,),
}

_IN_WORDS = {int: "an integer", float: "a number", bool: "true or false", str: "a string"}


def explain(error: BaseException) -> str:
    """Return one sentence for an error met while composing a configuration.

    Args:
        error: What Hydra or OmegaConf raised; the informative exception may be its cause.

    Returns:
        The sentence, on one line.
    """
    for cause in _causes(error):
        sentence = _explain_one(cause)
        if sentence:
            return sentence
    # OmegaConf appends types, and Hydra its search path, which do not help a user.
    texts = [re.split(r"\n *full_key:|\nConfig search path:", str(cause))[0] for cause in _causes(error)]
    return f"The configuration cannot be composed: {' '.join(' '.join(texts).split()).rstrip('.')}."


def explain_unknown_key(full_key: str, parent_type: type) -> str:
    """Return the sentence for a key that does not exist, with the nearest key and all keys of the same node.

    Args:
        full_key: The key as given, with dots.
        parent_type: Dataclass of the node that lacks it.
    """
    parent = full_key.rpartition(".")[0]
    option = OPTION_OF_TYPE.get(parent_type)
    nearest = _nearest_key(full_key)
    hint = f" (did you mean '{nearest}'?)" if nearest else f" with {option}" if option else ""
    known = ", ".join(field.name for field in dataclasses.fields(parent_type))
    return f"There is no key '{full_key}'{hint}; the keys of {option or parent or 'the configuration'} are {known}."


def all_keys() -> list[str]:
    """Return every key of the schema, with dots, those of all options of a group included."""
    return list(_all_keys(Config))


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _explain_one(error: BaseException) -> str | None:
    """Return the sentence for an error that carries enough to say what is wrong, otherwise None."""
    if isinstance(error, OverrideParseException):
        return f"The argument '{error.override}' cannot be read as key=value; quote values with special characters."
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options is not None:
        return _explain_missing_option(error.missing_cfg_file, error.options)
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key} must be given a value."
    parent_type = getattr(error, "object_type", None)
    if not (isinstance(parent_type, type) and dataclasses.is_dataclass(parent_type)):
        return None
    full_key, key = str(getattr(error, "full_key", None)), getattr(error, "key", None)
    if isinstance(error, ConfigKeyError | ConfigAttributeError):
        return explain_unknown_key(full_key, parent_type)
    hint = get_type_hints(parent_type).get(str(key))
    if isinstance(error, ValidationError) and hint is not None:
        return f"{full_key} must be {_in_words(hint)}, got {shown(error.value)}."
    return None


def _explain_missing_option(path: str, options: Any) -> str:
    group, _, option = path.rpartition("/")
    if group in ("hydra/launcher", "hydra/sweeper") and (sentence := missing_plugin(option)):
        return sentence
    near = difflib.get_close_matches(option, options, n=1)
    hint = f" (did you mean '{near[0]}'?)" if near else ""
    return f"There is no {group}={option}{hint}; choose one of {', '.join(options)}."


def _nearest_key(full_key: str) -> str | None:
    """Return the existing key that was probably meant: the same last part elsewhere, or a similar spelling."""
    keys = all_keys()
    if full_key in keys:
        return None  # the key exists, but another option of its group has it
    parent, _, leaf = full_key.rpartition(".")
    for key in keys:
        if key.rpartition(".")[2] == leaf:
            return key
    siblings = [key.rpartition(".")[2] for key in keys if key.rpartition(".")[0] == parent]
    near = difflib.get_close_matches(leaf, siblings, n=1)
    return f"{parent}.{near[0]}".lstrip(".") if near else None


def _all_keys(kind: type, prefix: str = "") -> Iterator[str]:
    hints = {
        name: hint for option in TYPES_OF_GROUP.get(kind, (kind,)) for name, hint in get_type_hints(option).items()
    }
    for name, hint in hints.items():
        yield prefix + name
        if dataclasses.is_dataclass(hint):
            yield from _all_keys(hint, f"{prefix}{name}.")  # type: ignore[arg-type]


def _in_words(hint: Any) -> str:
    """Say what values an annotation admits."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return " or ".join("null" if part is types.NoneType else _in_words(part) for part in get_args(hint))
    if origin is list:
        return f"a list such as [{'0.5,0.9' if get_args(hint) == (float,) else 'a,b'}]"
    if isinstance(hint, type) and issubclass(hint, Enum):
        texts = (str(member.value if isinstance(member.value, str) else member.name) for member in hint)
        return f"one of {', '.join(texts)}"
    return _IN_WORDS.get(hint, f"the keys of {getattr(hint, '__name__', hint)}")
