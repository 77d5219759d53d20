"""Checks of a preconditioner's state: all of it is checked before anything is changed.

A state comes from a file, which may belong to another model, be cut short or made by hand. Here is what concerns the
whole state; ``layer_checks`` checks the layers.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn, TypeGuard

from torch import Tensor

from kfac_sua.preconditioner.checkpoint.versions import OLDEST_VERSION
from kfac_sua.preconditioner.settings import LARGEST_FLOAT, LEAST_FLOAT

CURE = (
    "make the preconditioner for the model and with the settings that the state was saved from, or start without the "
    "state"
)

RESTART = "give what its state_dict() returned, or start without a state"
"""The cure for the states of other objects than preconditioners."""

MOST_STEPS = 2**40
"""More steps than any training takes, and far below the limits of seeds and messages."""


def check_outline(state: object) -> None:
    """Refuse an object that is not the state of a preconditioner of any version.

    Raises:
        ValueError: If it is no mapping, lacks an entry that every version has, or has one of another type.
    """
    if not isinstance(state, Mapping):
        _refuse("it", outlined(state), "what state_dict() of a preconditioner returned")
    version = _entry(state, "version")
    if not is_whole(version) or not OLDEST_VERSION <= version < 2**31:
        _refuse("version", outlined(version), f"a whole number >= {OLDEST_VERSION}")
    for key, value in _mapping(state, "settings").items():
        if not _is_plain(value):
            _refuse(f"settings.{key}", outlined(value), "a number, a string or a list of strings")
    for name, layer in _mapping(state, "layers").items():
        if not isinstance(layer, Mapping) or not isinstance(layer.get("inverse"), Mapping):
            _refuse(f"layers.{name}", outlined(layer), "a mapping with the mapping inverse in it")


def check_numbers(state: Mapping[str, Any]) -> None:
    """Refuse a state in today's version in which something besides the layers is out of range.

    Args:
        state: A state that :func:`check_outline` has accepted.

    Raises:
        ValueError: If an entry is missing, or has another type or a value that no training reaches.
    """
    num_steps, seed = _entry(state, "num_steps"), _entry(state, "seed")
    if not is_count(num_steps) or num_steps > MOST_STEPS:
        _refuse("num_steps", outlined(num_steps), f"a whole number in [0, {MOST_STEPS}]")
    if not is_whole(seed):
        _refuse("seed", outlined(seed), "a whole number")
    if not is_damping(_entry(state, "damping")):
        _refuse("damping", outlined(state["damping"]), "a number > 0 within the range of float32")
    for key, count in _mapping(state, "events").items():
        if not isinstance(key, str) or not is_count(count):
            _refuse(f"events.{key}", outlined(count), "a count >= 0 under a string")


def is_whole(value: object) -> TypeGuard[int]:
    """Return whether a value is a Python integer, and not a bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_count(value: object) -> TypeGuard[int]:
    """Return whether a value is a Python integer ≥ 0."""
    return is_whole(value) and value >= 0


def is_damping(value: object) -> TypeGuard[int | float]:
    """Return whether a value can be a damping; see ``settings.checked_damping``."""
    return is_number(value) and LEAST_FLOAT <= value <= LARGEST_FLOAT


def is_number(value: object) -> TypeGuard[int | float]:
    """Return whether a value is a finite Python number."""
    return is_whole(value) or (isinstance(value, float) and math.isfinite(value))


def outlined(value: object) -> str:
    """Return a value as shown in a message: on one line, cut to a readable length."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)}"
    try:
        if isinstance(value, Mapping):
            return f"a mapping of {_cut(', '.join(map(str, value)))}" if value else "an empty mapping"
        return _cut(repr(value))
    except ValueError:  # thousands of digits, which Python refuses to write out
        return f"too long an entry ({type(value).__name__})"


def _cut(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 80 else f"{text[:80]}..."


def checked_entries(state: object, names: Sequence[str], owner: str) -> list[Any]:
    """Return the entries of a small state, by name.

    Args:
        state: The state.
        names: All names that it must have.
        owner: The object whose state it is, for the message.

    Raises:
        ValueError: If it is no mapping, or a name is missing.
    """
    if not isinstance(state, Mapping) or not set(names) <= set(state):
        raise ValueError(f"{owner} state must be a mapping of {', '.join(names)}, got {outlined(state)}; {RESTART}.")
    return [state[name] for name in names]


def _is_plain(value: object) -> bool:
    """Return whether a value can be a setting."""
    if isinstance(value, list | tuple):
        return all(isinstance(one, str) for one in value)
    return value is None or isinstance(value, str | float) or (isinstance(value, int) and value.bit_length() < 64)


_MISSING = object()


def _entry(state: Mapping[str, Any], key: str) -> Any:
    value = state.get(key, _MISSING)
    if value is _MISSING:
        _refuse(key, "missing", "what state_dict() of a preconditioner returned")
    return value


def _mapping(state: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = _entry(state, key)
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        _refuse(key, outlined(value), "a mapping from strings")
    return value


def _refuse(entry: str, got: str, expected: str) -> NoReturn:
    raise ValueError(sentence(entry, got, expected))


def sentence(entry: str, got: str, expected: str) -> str:
    """Return what is wrong with an entry of a state, and what to do."""
    return f"Preconditioner state cannot be loaded: {entry} is {got}, expected {expected}; {CURE}."
