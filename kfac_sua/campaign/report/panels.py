"""Panels and methods of a campaign as the report shows them."""

from collections.abc import Callable

import pandas as pd

from kfac_sua.campaign.definition import Campaign, Panel
from kfac_sua.markdown import escape, join
from kfac_sua.methods import METHODS


def method_label(campaign: Campaign, method: str) -> str:
    """Return what tables call a method, escaped: the campaign's label, that of the figures, or its name."""
    known = METHODS[method].label if method in METHODS else method
    return escape(campaign.labels().get(method, known))


def per_panel(campaign: Campaign, section: Callable[[Panel], str]) -> str:
    """Return a part of the report for every panel, under its title where there are several."""
    if len(campaign.panels) == 1:
        return section(campaign.panels[0])
    return join([block for panel in campaign.panels for block in (f"### {escape(panel.title)}", section(panel))])


def curve_rows(frame: pd.DataFrame, panel: str, method: str) -> pd.DataFrame:
    """Return the rows of one curve."""
    return frame[(frame["panel"] == panel) & (frame["method"] == method)]
