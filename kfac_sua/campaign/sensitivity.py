"""How much the verdicts hang on the rule by which cells were chosen, as far as the grid can tell."""

from collections.abc import Sequence

import pandas as pd

from kfac_sua.campaign.claims import CLAIMS, judge
from kfac_sua.campaign.selection import Rule, best_fingerprint


def rule_table(grid: pd.DataFrame, claims: Sequence[str], val_size: int) -> pd.DataFrame:
    """Return the deciding numbers of the claims between the cells that each rule chooses, from the runs of the grid.

    The grid has one seed and is often shorter than the final runs, so these numbers have no interval and decide
    nothing; they show whether another rule would point the other way. Numbers that need seconds are left out, since
    runs of the grid share the device.

    Args:
        grid: Rows of ``collect_cells`` of all grids.
        claims: Keys of ``CLAIMS``.
        val_size: Number of held-out images, for the standard error.

    Returns:
        ``claim``, ``part`` (what is compared), ``threshold``, and one column per rule.
    """
    table: dict[tuple[str, str, str], dict[str, float]] = {}
    for rule in Rule:
        curves = grid.groupby(["panel", "method"], sort=False)
        chosen = {key: best_fingerprint(runs, rule, val_size) for key, runs in curves}
        keys = zip(grid["panel"], grid["method"], strict=True)
        kept = grid[[chosen[key] == fingerprint for key, fingerprint in zip(keys, grid["fingerprint"], strict=True)]]
        for claim in claims:
            for criterion, part in zip(CLAIMS[claim].criteria, judge(claim, kept).parts, strict=True):
                if criterion.measure.is_timed:
                    continue
                table.setdefault((claim, part.text, part.threshold), {})[str(rule)] = part.value
    rows = [dict(zip(("claim", "part", "threshold"), key, strict=True)) | values for key, values in table.items()]
    return pd.DataFrame(rows, columns=["claim", "part", "threshold", *map(str, Rule)])
