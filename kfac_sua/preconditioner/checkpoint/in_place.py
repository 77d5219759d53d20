"""Writing a state into the tensors in use, so that what reads them by address finds the new numbers."""

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

PARTS = "parts"
"""How the names of tensors end that hold bfloat16 parts of others (see ``forms/split.py``)."""


def written_over(kept: Any, new: Any, like: Tensor | None = None) -> Any:
    """Return nested dicts with the numbers of ``new``, in the tensors of ``kept`` where these have the same shapes.

    A captured step reads tensors by address, and so finds the new numbers. Where ``kept`` has no tensor of the shape,
    the result has a copy of the new one: the tensors that are written over later belong to nobody else. Many tensors
    are copied in one call.

    Args:
        kept: Nested dicts of tensors, numbers and ``None``, such as a layer's ``state_dict``.
        new: The same, with other numbers; keys and shapes may differ.
        like: A tensor of the device and the dtype that the result has, except bfloat16 parts, which stay bfloat16 and
            are known by their names; ``None`` for the devices and dtypes of ``new``.
    """
    result, write = to_be_written_over(kept, new, like)
    write()
    return result


def to_be_written_over(kept: Any, new: Any, like: Tensor | None = None) -> tuple[Any, Callable[[], None]]:
    """Return what :func:`written_over` returns, before the numbers are written, and the function that writes them.

    Until it is called nothing has changed; afterwards it needs no more memory.
    """
    pairs: dict[Any, list[tuple[Tensor, Tensor]]] = defaultdict(list)
    result = _paired("", kept, new, like, pairs)

    def write() -> None:
        for alike in pairs.values():
            torch._foreach_copy_([one for one, _ in alike], [other for _, other in alike])

    return result, write


def _paired(name: str, kept: Any, new: Any, like: Tensor | None, pairs: dict[Any, list[tuple[Tensor, Tensor]]]) -> Any:
    """Return what :func:`written_over` returns, and note in ``pairs`` which tensors are to be copied into which."""
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
