"""The titles of a campaign, completed by what the records of its runs say: at another scale they are other runs."""

import dataclasses

import pandas as pd

from kfac_sua.campaign.definition import Campaign
from kfac_sua.figures.titles import panel_subjects, subject


def titled(campaign: Campaign, finals: pd.DataFrame) -> Campaign:
    """Return a campaign whose titles name the network and the data set of its runs.

    Args:
        campaign: The campaign as defined, whose title says what records do not: which figure or ablation it is.
        finals: Rows of ``collect_cells`` of its final runs.
    """
    titles = panel_subjects(finals)
    panels = [dataclasses.replace(panel, title=titles[panel.name]) for panel in campaign.panels]
    return dataclasses.replace(campaign, title=f"{campaign.title}: {subject(finals)}", panels=panels)
