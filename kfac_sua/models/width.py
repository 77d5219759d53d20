"""The width multiplier: one number that makes a network thinner or wider without changing its depth."""

from __future__ import annotations

import math

MIN_CHANNELS = 8


def scale_channels(channels: int, width: float) -> int:
    """Return ``channels`` times ``width``, rounded to the nearest integer (ties to even) and at least 8.

    Args:
        channels: Channels at width 1.
        width: Width multiplier, finite and positive.

    Returns:
        Number of channels.

    Raises:
        ValueError: If ``width`` is not finite and positive.
    """
    if not (math.isfinite(width) and width > 0):
        raise ValueError(f"model.width must be > 0 and finite, got {width}.")
    return max(MIN_CHANNELS, round(channels * width))
