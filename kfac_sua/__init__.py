"""Structured Fisher preconditioners (K-FAC, SUA, channel groups) for PyTorch."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kfac_sua.load import LoadedRun, load_run
    from kfac_sua.preconditioner import (
        AdaptiveDamping,
        CapturedStep,
        DampingScheduler,
        KroneckerPreconditioner,
        KroneckerSettings,
        exponential_damping,
    )

__all__ = [
    "AdaptiveDamping",
    "CapturedStep",
    "DampingScheduler",
    "KroneckerPreconditioner",
    "KroneckerSettings",
    "LoadedRun",
    "exponential_damping",
    "load_run",
]

__version__ = "0.1.0"  # the only place: the build reads it here


def __getattr__(name: str) -> Any:
    """Import a public name, and with it PyTorch, when it is first asked for.

    Python imports this file before the first line of a command, which must react to Ctrl-C from then on.
    """
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = "load" if name in ("LoadedRun", "load_run") else "preconditioner"
    return getattr(importlib.import_module(f"{__name__}.{module}"), name)
