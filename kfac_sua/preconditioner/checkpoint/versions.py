"""Checkpoints of a preconditioner: nested dicts of tensors and numbers, loadable with ``weights_only=True``.

What a layer, a factor or an inverse keeps stands beside it; here is what concerns all of them.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from kfac_sua.preconditioner.settings import KroneckerSettings

State = dict[str, Any]

PARTS = "parts"
"""What names of tensors end with that are bfloat16 parts of others (see ``forms/split.py``)."""

STATE_VERSION = 5
"""Of a preconditioner's whole state: a number for each change of what it holds."""

OLDEST_VERSION = 2
"""The first that can be read."""


def up_to_date(state: Mapping[str, Any], settings: KroneckerSettings) -> Mapping[str, Any]:
    """Return a preconditioner's state in today's version, if it is of one of the three versions before.

    Version 2 had neither a damping that could change nor settings that came with it, and counted examples per process.
    Version 3 had Python numbers where exact damping has 0-d tensors today. Version 4 had no inverses in parts, and no
    setting ``products``.

    Args:
        state: What ``KroneckerPreconditioner.state_dict`` returned, in any release; ``state_checks.check_outline`` has
            let it pass.
        settings: Those of the preconditioner that shall continue.
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
    """Whether it is a number that float64 holds; what is none is refused later, with all that is of no use."""
    return isinstance(value, float) or (type(value) is int and value.bit_length() < 1000)


def _from_version_4(state: Mapping[str, Any], settings: KroneckerSettings) -> State:
    saved = {**state["settings"], "products": str(settings.products)}
    return {**state, "version": STATE_VERSION, "settings": saved}


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


def written_over(kept: Any, new: Any, like: Tensor | None = None) -> Any:
    """Return nested dicts with the numbers of ``new``, in the tensors of ``kept`` where these have the same shapes.

    So what is read by address, as by a captured step, is found where it was. Where there is no such tensor, it is a
    copy of the new one: nothing that is written over later is somebody else's. Many tensors are copied in one call.

    Args:
        kept: Nested dicts of tensors, numbers and ``None``, such as a layer's ``state_dict``.
        new: The same, with other numbers; keys and shapes may be others.
        like: A tensor of the device and the dtype that the tensors shall have, but for bfloat16 parts, which stay that
            and are known by their names; ``None`` for those of ``new``.
    """
    result, write = to_be_written_over(kept, new, like)
    write()
    return result


def to_be_written_over(kept: Any, new: Any, like: Tensor | None = None) -> tuple[Any, Callable[[], None]]:
    """Return what :func:`written_over` does, and what still has to be called for the numbers in it to be the new ones.

    Until then nothing has changed, and all memory that it takes is at hand.
    """
    pairs: dict[Any, list[tuple[Tensor, Tensor]]] = defaultdict(list)
    result = _paired("", kept, new, like, pairs)

    def write() -> None:
        for alike in pairs.values():
            torch._foreach_copy_([one for one, _ in alike], [other for _, other in alike])

    return result, write


def _paired(name: str, kept: Any, new: Any, like: Tensor | None, pairs: dict[Any, list[tuple[Tensor, Tensor]]]) -> Any:
    """Return what :func:`written_over` does, and note which tensors are still to be copied into which."""
    if isinstance(new, Mapping):
        kept = kept if isinstance(kept, Mapping) else {}
        return {key: _paired(key, kept.get(key), value, like, pairs) for key, value in new.items()}
    if not isinstance(new, Tensor):
        return new
    device = new.device if like is None else like.device
    dtype = new.dtype if like is None or name.endswith(PARTS) else like.dtype
    if isinstance(kept, Tensor) and (kept.shape, kept.dtype, kept.device) == (new.shape, dtype, device):
        pairs[dtype, new.dtype, device, new.device].append((kept, new))
        return kept
    return new.to(device, dtype, copy=True)
