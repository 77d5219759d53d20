"""What is left of an earlier report where another cannot be made."""

import pandas as pd
import pytest
from campaign.report_inputs import TWO, campaign, final_frame
from campaign.test_definition import make_plan

from kfac_sua.campaign.conduct import Results
from kfac_sua.campaign.publish import publish
from kfac_sua.campaign.selection import Rule
from kfac_sua.runs.final_table import CollectError


def test_final_runs_of_several_precisions_leave_an_earlier_report_as_it_is(tmp_path):
    """They are refused before anything is removed or written."""
    finals = final_frame(campaign(TWO))
    finals = finals.assign(precision=finals["method"].map({"baseline": "tf32", "sua": "float32"}))
    results = Results(grid_cells=[], final_cells=[], grid=pd.DataFrame(), finals=finals, choices=[])
    earlier = tmp_path / "report" / "report.md"
    earlier.parent.mkdir()
    earlier.write_text("# An earlier report\n")
    with pytest.raises(CollectError, match=r"\(float32: sua; tf32: baseline\)"):
        publish(make_plan(tmp_path), scale="smoke", device="cpu", rule=Rule.val_error, results=results, command="")
    assert list(tmp_path.rglob("*.*")) == [earlier]
    assert earlier.read_text() == "# An earlier report\n"
