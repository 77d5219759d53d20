"""Numbers as they are given, made Python's own: NumPy's, 0-d tensors and arrays. Standard library only.

So a grid may come from NumPy and a damping from a tensor, while settings and checkpoints hold plain numbers.
"""

import numbers
import operator

_SHOWN = 60
"""Characters of a value that a message shows at most."""


def plain_number(value: object) -> int | float | None:
    """Return a real number as Python's ``int`` or ``float``; ``None`` for anything else, ``bool`` included.

    A tensor on a device is waited for.

    Args:
        value: Python's or NumPy's number, a tensor or an array without dimensions.
    """
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        try:
            value = value.item()
        except RuntimeError:  # a meta tensor has none
            return None
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return None
    if isinstance(value, numbers.Integral):
        return operator.index(value)
    try:
        return float(value)
    except OverflowError:  # a fraction beyond the range of float
        return None


def plain_integer(value: object) -> int | None:
    """Return an integer as Python's ``int``; ``None`` for anything else, 4.0 included."""
    number = plain_number(value)
    return number if isinstance(number, int) else None


def shown(value: object) -> str:
    """Return a value in one line, with its type unless that shows, for a message that it is of the wrong one."""
    kind = type(value)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    text = " ".join((repr(value) if isinstance(value, str) else str(value)).split())
    text = text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
    return text if value is None or kind in (int, float) else f"{text} ({name})"


def checked_number(name: str, value: object) -> int | float:
    """Return a number as Python's own.

    Raises:
        ValueError: If it is none; the message names what it is for, and its type.
    """
    number = plain_number(value)
    if number is None:
        raise ValueError(f"{name} must be a number, got {shown(value)}.")
    return number


def checked_integer(name: str, value: object) -> int:
    """Return an integer as Python's own.

    Raises:
        ValueError: If it is none; the message names what it is for, and its type.
    """
    number = plain_integer(value)
    if number is None:
        raise ValueError(f"{name} must be an integer, got {shown(value)}.")
    return number
