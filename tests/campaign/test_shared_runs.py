"""Panels and curves that are one and the same at a scale: what their titles and the report say."""

import pandas as pd
from campaign.report_inputs import campaign, final_frame, report_input, written
from campaign.test_definition import make_plan

from kfac_sua.campaign.definition import campaign_names, load_campaign
from kfac_sua.campaign.publish import labelled, titled
from kfac_sua.campaign.report.shared import shared_paragraph

METHODS = ["baseline", "sua"]


def test_no_campaign_says_itself_what_its_records_say():
    """Neither networks nor data sets stand in the files, which hold at every scale."""
    for name in campaign_names():
        definition = load_campaign(name)
        assert not any(word in definition.title for word in ("VGG", "ResNet", "CIFAR")), name
        assert all(panel.title == "" for panel in definition.panels), name


def test_titles_are_completed_by_the_records():
    """At another scale the same campaign has another title."""
    definition = campaign({"vgg11": METHODS}, title="Figure 1")
    finals = final_frame(definition)
    assert titled(definition, finals).title == "Figure 1: VGG11 on CIFAR-10"
    small = titled(definition, finals.assign(model="tiny", dataset="digits"))
    assert small.title == "Figure 1: tiny on digits"
    assert [panel.title for panel in small.panels] == ["tiny on digits"]


def test_labels_have_the_channels_per_group_of_the_scale(tmp_path):
    """Figure 2 at an eighth of the width has groups of 8, and at full width those of the paper."""
    for scale, expected in (("small", "SUA, groups of 8"), ("full", "SUA, groups of 64")):
        plan = make_plan(tmp_path, "fig2", scale)
        assert labelled(plan.campaign, plan.all_grid_cells(plan.grids())).labels() == {"sua_grouped": expected}


def test_panels_that_share_all_runs_are_said_to(tmp_path):
    """The report opens with it, and counts their runs once."""
    definition = campaign({"left": METHODS, "middle": METHODS, "right": METHODS})
    finals = final_frame(definition)
    shared = finals["panel"] == "right"
    middle = finals[finals["panel"] == "middle"].reset_index(drop=True)
    finals = pd.concat([finals[~shared], middle.assign(panel="right")], ignore_index=True)
    markdown, _ = written(report_input(definition, finals), tmp_path)
    opening = markdown.split("\n## ")[0]
    assert "these are the same runs: the panels middle and right.**" in opening
    assert "; 12 final runs trained" in opening
    assert "the same runs" not in written(report_input(definition, final_frame(definition)), tmp_path)[0]


def test_curves_that_share_runs_or_numbers_are_said_to():
    """Runs that are one, and runs of their own that computed the same; curves that differ are not named."""
    definition = campaign({"vgg11": ["kfac", "sua", "grouped"]})
    finals = final_frame(definition)
    assert shared_paragraph(definition, finals) == ""
    sua = finals[finals["method"] == "sua"]
    rest = finals[finals["method"] != "grouped"]
    one = shared_paragraph(definition, pd.concat([rest, sua.assign(method="grouped")]))
    assert "the same runs: the curves SUA and K-FAC, groups." in one
    assert "The same numbers" not in one
    two = shared_paragraph(definition, pd.concat([rest, sua.assign(method="grouped", run="other/" + sua["run"])]))
    assert "The same numbers, in runs of their own, have the curves SUA and K-FAC, groups" in two
    assert "the same runs" not in two
