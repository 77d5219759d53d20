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
        key: Whose seeds they are. It alone seeds the generator: draws of different keys are independent, and those of
            one key are always the same, so that a number does not depend on which others are computed.

    Returns:
        Positions of the drawn seeds, ``[resamples, num_seeds]``, sorted within a resample: equal draws then have
        means that are equal to the last bit.
    """
    generator = np.random.default_rng(list(key.encode()))
    return np.sort(generator.integers(num_seeds, size=(resamples, num_seeds)), axis=1)


def interval(values: "NDArray[np.float64]") -> tuple[float, float]:
    """Return the percentile interval of a statistic over resamples.

    Both ends are values of the statistic; where a quantile falls between two values, the outer one is taken, so that
    nothing is interpolated towards infinity. A percentile interval over few seeds is narrower than its nominal coverage
    says: over three seeds it cannot leave the range of their values.

    Args:
        values: The statistic, ``[resamples]``: finite differences, or ratios, which may be infinite. A NaN is the ratio
            of two infinities or zeros and could be any number from 0 to infinity; it counts as 0 for the lower end and
            as infinity for the upper one.

    Returns:
        Lower and upper end of the central 95 %.
    """
    tail = (1 - CONFIDENCE) / 2 * (len(values) - 1)
    low = np.sort(np.where(np.isnan(values), 0.0, values))[int(np.floor(tail))]
    high = np.sort(np.where(np.isnan(values), np.inf, values))[len(values) - 1 - int(np.floor(tail))]
    return float(low), float(high)
