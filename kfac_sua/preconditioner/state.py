"""Checkpoints of a preconditioner: nested dicts of tensors and numbers, loadable with ``weights_only=True``.

What a layer, a factor or an inverse keeps stands beside it; here is what concerns all of them.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kfac_sua.preconditioner.settings import KroneckerSettings

State = dict[str, Any]

STATE_VERSION = 4
"""Of a preconditioner's whole state: a number for each change of what it holds."""


def up_to_date(state: Mapping[str, Any], settings: KroneckerSettings) -> Mapping[str, Any]:
    """Return a preconditioner's state in today's version, if it is of one of the two versions before.

    Version 2 had neither a damping that could change nor settings that came with it, and counted examples per process.
    Version 3 had Python numbers where exact damping has 0-d tensors today.

    Args:
        state: What ``KroneckerPreconditioner.state_dict`` returned, in any release.
        settings: Those of the preconditioner that shall continue.
    """
    if state["version"] == 2:
        state = _from_version_2(state, settings)
    return _from_version_3(state) if state["version"] == 3 else state


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
            key: torch.tensor(value, dtype=torch.float64) if isinstance(value, int | float) else value
            for key, value in layer["inverse"].items()
        }
        layers[name] = {**layer, "inverse": inverse}
    return {**state, "version": STATE_VERSION, "layers": layers}


def check_state(state: Mapping[str, Any], settings: KroneckerSettings, layers: set[str], passed_over: set[str]) -> None:
    """Refuse a preconditioner's state that another preconditioner cannot continue from.

    Args:
        state: What ``KroneckerPreconditioner.state_dict`` returned.
        settings: Those of the one that shall continue.
        layers: Names of its layers.
        passed_over: Settings that may differ.

    Raises:
        ValueError: If the state has another version, other settings or other layers; the message names them.
    """
    if state["version"] != STATE_VERSION:
        raise ValueError(f"Preconditioner state has version {state['version']}, this release reads {STATE_VERSION}.")
    own, saved = settings.to_plain(), state["settings"]
    differing = [
        f"{key}={saved.get(key)} (here {value})"
        for key, value in own.items()
        if saved.get(key) != value and key not in passed_over
    ]
    if differing:
        raise ValueError(f"Preconditioner state was saved with other settings: {', '.join(differing)}.")
    if set(state["layers"]) != layers:
        names = ", ".join(sorted(set(state["layers"]) ^ layers))
        raise ValueError(f"Preconditioner state belongs to another model; layers that differ: {names}.")


def written_over(kept: Any, new: Any, like: Tensor) -> Any:
    """Return nested dicts with the numbers of ``new``, in the tensors of ``kept`` where these have the same shapes.

    So what is read by address, as by a captured step, is found where it was. Where there is no such tensor, it is a
    copy of the new one: nothing that is written over later is somebody else's.

    Args:
        kept: Nested dicts of tensors, numbers and ``None``, such as a layer's ``state_dict``.
        new: The same, with other numbers; keys and shapes may be others.
        like: A tensor of the device and the dtype that the tensors shall have.
    """
    if isinstance(new, Mapping):
        kept = kept if isinstance(kept, Mapping) else {}
        return {key: written_over(kept.get(key), value, like) for key, value in new.items()}
    if not isinstance(new, Tensor):
        return new
    if isinstance(kept, Tensor) and (kept.shape, kept.dtype, kept.device) == (new.shape, like.dtype, like.device):
        return kept.copy_(new)
    return new.to(like, copy=True)
