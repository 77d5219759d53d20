"""The context in which a named piece of the preconditioner's work runs, such as a timer of a benchmark."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

Phase = Callable[[str], AbstractContextManager[Any]]
"""Called with ``"statistics"``, ``"inversion"`` or ``"application"``, returns the context that the work runs in."""


def no_phase(name: str) -> AbstractContextManager[None]:
    """Return a context that does nothing."""
    del name
    return nullcontext()


@dataclass
class PhaseSource:
    """The phase in use: one object that all parts of a preconditioner share, so that the phase can be replaced."""

    phase: Phase = no_phase
