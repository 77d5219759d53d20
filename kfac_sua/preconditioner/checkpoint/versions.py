"""Versions of a preconditioner's state, which is nested dicts of tensors and numbers.

What a layer, a factor or an inverse keeps is decided in its own file; here is what concerns all of them.
"""

from collections.abc import Mapping
from typing import Any

import torch

from kfac_sua.preconditioner.settings import KroneckerSettings

State = dict[str, Any]

STATE_VERSION = 5
"""Version of a preconditioner's state; each change of what it holds raises it."""

OLDEST_VERSION = 2
"""The oldest version that can be read."""


def up_to_date(state: Mapping[str, Any], settings: KroneckerSettings) -> Mapping[str, Any]:
    """Return a preconditioner's state in today's version, if it is of a version that can be read.

    Version 2 had no damping that could change and fewer settings, and counted examples per process. Version 3 had
    Python numbers for the 0-d tensors of exact damping. Version 4 had no setting ``products`` and no inverses in
    bfloat16 parts.

    Args:
        state: What ``KroneckerPreconditioner.state_dict`` returned, in any release; ``checks.check_outline`` has
            accepted it.
        settings: Settings of the preconditioner that continues from it.
    """
    if state["version"] == 2:
        state = _from_version_2(state, settings)
    if state["version"] == 3:
        state = _from_version_3(state)
    return _from_version_4(state, settings) if state["version"] == 4 else state


def _from_version_2(state: Mapping[str, Any], settings: KroneckerSettings) -> State:
    own = settings.to_plain()
    saved = {name: None for name in own if name not in state["settings"]} | dict(state["settings"])
    layers = {
        name: {key: value for key, value in layer.items() if key != "examples_per_process"}
        | {"num_examples": None, "factors": {}}
        for name, layer in state["layers"].items()
    }
    return {**state, "version": 3, "settings": saved, "layers": layers, "damping": saved["damping"]}


def _from_version_3(state: Mapping[str, Any]) -> State:
    layers = {}
    for name, layer in state["layers"].items():
        inverse = {
            key: torch.tensor(float(value), dtype=torch.float64) if _is_float(value) else value
            for key, value in layer["inverse"].items()
        }
        layers[name] = {**layer, "inverse": inverse}
    return {**state, "version": 4, "layers": layers}


def _is_float(value: object) -> bool:
    """Whether a value is a number that float64 holds; other values are refused later, with all other findings."""
    return isinstance(value, float) or (type(value) is int and value.bit_length() < 1000)


def _from_version_4(state: Mapping[str, Any], settings: KroneckerSettings) -> State:
    saved = {**state["settings"], "products": str(settings.products)}
    return {**state, "version": STATE_VERSION, "settings": saved}


def check_state(state: Mapping[str, Any], settings: KroneckerSettings, layers: set[str], passed_over: set[str]) -> None:
    """Refuse a preconditioner's state that another preconditioner cannot continue from.

    Args:
        state: What ``KroneckerPreconditioner.state_dict`` returned.
        settings: Settings of the preconditioner that continues from it.
        layers: Names of its layers.
        passed_over: Settings that may differ.

    Raises:
        ValueError: If the state has another version, other settings or other layers; the message names them.
    """
    if state["version"] != STATE_VERSION:
        raise ValueError(
            f"Preconditioner state has version {state['version']}, this release reads {STATE_VERSION} and older ones "
            f"down to {OLDEST_VERSION}; load it with the release that saved it, or start without the state."
        )
    own, saved = settings.to_plain(), state["settings"]
    differing = [
        f"{key}={saved.get(key)} (here {value})"
        for key, value in own.items()
        if saved.get(key) != value and key not in passed_over
    ]
    if differing:
        raise ValueError(
            f"Preconditioner state was saved with other settings: {', '.join(differing)}; make the preconditioner with "
            f"those, or start without the state."
        )
    if set(state["layers"]) != layers:
        names = ", ".join(sorted(set(state["layers"]) ^ layers))
        raise ValueError(
            f"Preconditioner state belongs to another model; layers that differ: {names}; make the preconditioner for "
            f"the model that the state was saved from, or start without the state."
        )
