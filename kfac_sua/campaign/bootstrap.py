"""Percentile bootstrap over seeds: how far a number could move had other seeds been drawn."""

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

CONFIDENCE = 0.95
RESAMPLES = 2000


def resampled_seeds(num_seeds: int, resamples: int, key: str) -> "NDArray[np.intp]":
    """Draw seeds with replacement.

    Args:
        num_seeds: Seeds to draw from, and per resample.
        resamples: Number of resamples.
        key: Whose seeds they are. It alone seeds the generator: different keys are drawn independently, and the same
            key always alike, so that a number does not depend on which others are computed beside it.

    Returns:
        Positions of the drawn seeds, ``[resamples, num_seeds]``, sorted within a resample: equal draws then have
        means that are equal to the last bit.
    """
    generator = np.random.default_rng(list(key.encode()))
    return np.sort(generator.integers(num_seeds, size=(resamples, num_seeds)), axis=1)


def interval(values: "NDArray[np.float64]") -> tuple[float, float]:
    """Return the percentile interval of a statistic over resamples.

    Both ends are attained values, the outer ones where a quantile falls between two: nothing is interpolated towards
    infinity. A percentile interval over few seeds is narrower than its nominal coverage: with three it cannot leave
    the range of what three seeds gave.

    Args:
        values: The statistic, ``[resamples]``: finite differences, or ratios, which may be infinite. NaN is the ratio
            of two infinities or zeros, which could be any from 0 to infinity, so it counts as 0 for the lower end and
            as infinity for the upper.

    Returns:
        Lower and upper end of the central 95 %.
    """
    tail = (1 - CONFIDENCE) / 2 * (len(values) - 1)
    low = np.sort(np.where(np.isnan(values), 0.0, values))[int(np.floor(tail))]
    high = np.sort(np.where(np.isnan(values), np.inf, values))[len(values) - 1 - int(np.floor(tail))]
    return float(low), float(high)
