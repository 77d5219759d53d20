"""Numbers from NumPy, 0-d tensors and arrays as Python's ``int`` and ``float``. Standard library only.

A grid may thus come from NumPy and a damping from a tensor, while settings and checkpoints hold plain numbers.
"""

import numbers
import operator

_SHOWN = 60
"""Largest number of characters of a value that a message shows, so that the message stays one sentence."""


def plain_number(value: object) -> int | float | None:
    """Return a real number as Python's ``int`` or ``float``; ``None`` for anything else, ``bool`` included.

    Reading a tensor waits for its device.

    Args:
        value: A number of Python or NumPy, or a tensor or an array without dimensions.
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
    """Return a value in one line, with its type unless it is obvious, for a message about a value of the wrong type."""
    kind = type(value)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    text = " ".join((repr(value) if isinstance(value, str) else str(value)).split())
    text = text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
    return text if value is None or kind in (int, float) else f"{text} ({name})"


def checked_number(name: str, value: object) -> int | float:
    """Return a number as Python's ``int`` or ``float``.

    Args:
        name: What the number is for.
        value: The number.

    Raises:
        ValueError: If the value is not a number; the message gives name, value and type.
    """
    number = plain_number(value)
    if number is None:
        raise ValueError(f"{name} must be a number, got {shown(value)}.")
    return number


def checked_integer(name: str, value: object) -> int:
    """Return an integer as Python's ``int``.

    Args:
        name: What the integer is for.
        value: The integer.

    Raises:
        ValueError: If the value is not an integer; the message gives name, value and type.
    """
    number = plain_integer(value)
    if number is None:
        raise ValueError(f"{name} must be an integer, got {shown(value)}.")
    return number
