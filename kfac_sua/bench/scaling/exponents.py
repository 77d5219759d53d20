"""Exponents of growth: fitted to seconds, counted from FLOPs, and stated by the paper."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from kfac_sua.bench.scaling.cases import COSTS

# Exponents of the paper's counts of G⁻¹ (Laurent et al. 2018): O((k²m)³) for K-FAC and O(m³) for SUA (Sec. 2.1),
# O(g(k²m/g)³) for K-FAC and O(g(m/g)³) for SUA with channel groups (Sec. 2.2). Its text calls g the group size; the
# formula, and the example after it, mean the number of groups, so that at a fixed group size s = m/g the counts are
# (m/s)(k²s)³ and (m/s)s³. The mini-batch is in none of them.
PAPER_INVERSION = {
    "width": {"kfac": 3, "sua": 3, "grouped": 1, "sua_grouped": 1},
    "kernel": {"kfac": 6, "sua": 0, "grouped": 6, "sua_grouped": 0},
    "group": {"grouped": 2, "sua_grouped": 2},
    "batch": {"kfac": 0, "sua": 0, "grouped": 0, "sua_grouped": 0},
}

_COLUMNS = (
    *("sweep", "method", "inverse_method", "cost", "exponent", "standard_error"),
    *("points", "smallest", "largest", "counted_exponent", "paper_exponent"),
)
_FEWEST_POINTS = 3  # of which a standard error can be given


@dataclasses.dataclass(frozen=True)
class Exponent:
    """Slope of a line through logarithms.

    Args:
        slope: By least squares.
        standard_error: Of the slope, from the residuals; NaN below three points.
    """

    slope: float
    standard_error: float


_NO_LINE = Exponent(math.nan, math.nan)


def fit_exponent(sizes: Sequence[float], values: Sequence[float]) -> Exponent:
    """Return p of ``value ∝ sizeᵖ``, by least squares on the logarithms.

    Args:
        sizes: Different from each other, > 0.
        values: Seconds or FLOPs, > 0.

    Returns:
        The exponent; NaN below two points.
    """
    x, y = np.log(np.asarray(sizes, dtype=float)), np.log(np.asarray(values, dtype=float))
    if len(x) < 2:
        return _NO_LINE
    centred = x - x.mean()
    slope = float(centred @ y / (centred @ centred))
    residuals = y - y.mean() - slope * centred
    degrees = len(x) - 2
    error = math.sqrt(float(residuals @ residuals) / degrees / float(centred @ centred)) if degrees else math.nan
    return Exponent(slope, error)


def upper_half(sizes: Sequence[int]) -> list[int]:
    """Return the larger half of the sizes, or the three largest if that is more: small sizes measure overhead."""
    ordered = sorted(set(sizes))
    return ordered[-max(_FEWEST_POINTS, -(-len(ordered) // 2)) :]


def exponent_table(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the exponents of every sweep, structure and cost.

    Args:
        frame: Result of ``record.to_frame``.

    Returns:
        A row each, with ``exponent``, its ``standard_error``, the sizes it was fitted to (``points``, ``smallest``,
        ``largest``), the ``counted_exponent`` of dense FLOPs fitted to the same sizes, and the ``paper_exponent``
        (NaN for costs that the paper does not count). The first two are NaN where inverses are dense at some of the
        sizes and of low rank at others: no line goes through both.
    """
    measured = frame[(frame["note"] == "") & (frame["cost"] != COSTS[0])]
    lines = measured.groupby(["sweep", "method", "inverse_method", "cost"], sort=False)
    return pd.DataFrame([_row(points) for _, points in lines], columns=list(_COLUMNS))


def _row(points: pd.DataFrame) -> dict[str, Any]:
    """Return what one line has: one structure, one way of inverting, one cost, along one sweep."""
    names = {key: str(points[key].iloc[0]) for key in ("sweep", "method", "inverse_method", "cost")}
    used = points[points["size"].isin(upper_half(points["size"].tolist()))]
    sizes = used["size"].tolist()
    is_mixed = used["is_low_rank"].nunique() > 1
    seconds = _NO_LINE if is_mixed else fit_exponent(sizes, used["seconds"].tolist())
    paper = PAPER_INVERSION[names["sweep"]][names["method"]] if names["cost"] == "inversion" else math.nan
    return names | {
        "exponent": seconds.slope,
        "standard_error": seconds.standard_error,
        "points": len(sizes),
        "smallest": min(sizes),
        "largest": max(sizes),
        "counted_exponent": fit_exponent(sizes, used["dense_flops"].tolist()).slope,
        "paper_exponent": paper,
    }
