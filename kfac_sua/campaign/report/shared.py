"""Which panels and curves of a campaign coincide, in words: at some scales nothing distinguishes them."""

from collections.abc import Callable, Hashable, Sequence

import pandas as pd

from kfac_sua.campaign.definition import Campaign, Panel
from kfac_sua.campaign.report.panels import curve_rows, method_label
from kfac_sua.markdown import escape, join, listed

_COMPUTED = ["seed", "epoch", "train_loss", "train_eval_loss", "val_loss", "val_error"]  # all but seconds


def shared_paragraph(campaign: Campaign, finals: pd.DataFrame) -> str:
    """Return which panels, or curves of a panel, are the same runs or have the same numbers; empty if none are.

    Args:
        campaign: Panels and methods, in their order.
        finals: Rows of ``collect_runs`` of the final runs, with ``panel`` and ``method``.
    """
    panels = {panel.name: _of_curves(finals, panel, _runs) for panel in campaign.panels}
    same_panels = _equal({name: curves for name, curves in panels.items() if curves})
    same_runs: list[str] = []
    same_numbers: list[str] = []
    for panel in campaign.panels:
        where = f" in panel {escape(panel.name)}" if len(campaign.panels) > 1 else ""
        for groups, identity in ((same_runs, _runs), (same_numbers, _numbers)):
            for methods in _equal(dict(_of_curves(finals, panel, identity))):
                labels = listed([method_label(campaign, method) for method in methods])
                groups.append(f"the curves {labels}{where}")
    groups = [f"the panels {listed([*map(escape, names)])}" for names in same_panels] + same_runs
    of_their_own = [curves for curves in same_numbers if curves not in same_runs]
    return join(
        [
            f"**At this scale and with these settings, these are the same runs: {'; '.join(groups)}.** Nothing in their"
            " configurations tells them apart, so that they are one result and not several."
            if groups
            else "",
            f"**The same numbers, in runs of their own, have {'; '.join(of_their_own)}**: what tells their settings"
            " apart has no effect in these runs."
            if of_their_own
            else "",
        ]
    )


def _of_curves(
    finals: pd.DataFrame, panel: Panel, identity: Callable[[pd.DataFrame], Hashable]
) -> tuple[tuple[str, Hashable], ...]:
    """Return the identity of every method of a panel that has runs."""
    rows = {curve.method: curve_rows(finals, panel.name, curve.method) for curve in panel.curves}
    return tuple((method, identity(runs)) for method, runs in rows.items() if len(runs))


def _runs(rows: pd.DataFrame) -> Hashable:
    return frozenset(rows["run"])


def _numbers(rows: pd.DataFrame) -> Hashable:
    return tuple(rows[_COMPUTED].itertuples(index=False, name=None))


def _equal(identities: dict[str, Hashable]) -> Sequence[list[str]]:
    """Return the groups of names with one identity."""
    groups: dict[Hashable, list[str]] = {}
    for name, identity in identities.items():
        groups.setdefault(identity, []).append(name)
    return [names for names in groups.values() if len(names) > 1]
