"""Reads for which the host would wait for a GPU, but which on a CPU are no operations that a mode could see."""

from collections.abc import Callable
from typing import Any

from torch import Tensor


def refuse_unseen_reads(monkeypatch, is_forbidden: Callable[[], bool]) -> None:
    """Fail where a tensor is read past the dispatcher, or copied from a CPU to itself, while that is forbidden."""

    def refusing(method: Callable[..., Any]) -> Callable[..., Any]:
        def refuse(*args: Any, **kwargs: Any) -> Any:
            if is_forbidden():
                raise AssertionError(f"Tensor.{method.__name__} waits for the device")
            return method(*args, **kwargs)

        return refuse

    for name in ("tolist", "numpy", "cpu"):
        monkeypatch.setattr(Tensor, name, refusing(getattr(Tensor, name)))
