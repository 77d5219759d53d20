"""Every campaign by the real command at the smallest scale, to its end."""

import subprocess
import sys
from pathlib import Path

import pytest

from kfac_sua.campaign.definition import campaign_names

ROOT = Path(__file__).resolve().parents[2]


def call(name: str, out: Path, *arguments: str) -> str:
    """Carry out a campaign with one seed, check that it has ended well, and return its report."""
    command = [sys.executable, "-m", "kfac_sua.reproduce", name, "--scale", "smoke", "--seeds", "1", "--jobs", "2"]
    result = subprocess.run(
        [*command, "--out", str(out), *arguments, "device=cpu"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=1500,  # a loaded machine takes minutes for the largest
        check=False,
    )
    assert (result.returncode, result.stderr) == (0, ""), result.stdout + result.stderr
    assert all((out / "report" / f"{figure}.png").exists() for figure in (name, "grid", "time_split"))
    return (out / "report" / "report.md").read_text()


@pytest.mark.slow
def test_figure_2_ends_where_two_panels_are_one_configuration(tmp_path):
    """On one data set the middle and the right panel are the same runs; titles and report say what was run."""
    report = call("fig2", tmp_path, "--only", "baseline")
    assert report.startswith("# Figure 2: tiny on digits\n")
    assert "the same runs: the panels middle and right" in report
    assert "CIFAR-10," not in report.split("\n## Figures")[1].split("\n## What differs")[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", campaign_names())
def test_every_campaign_ends(name, tmp_path):
    """With all of its curves: figures, tables and report."""
    report = call(name, tmp_path)
    assert ": tiny on digits\n" in report.splitlines(keepends=True)[0]
    # The widest layer of the tiny network has fewer channels than the largest groups, and a run fewer than 50 steps.
    is_degenerate = name in ("ablation_group_size", "ablation_refresh")
    assert ("**The same numbers, in runs of their own" in report) == is_degenerate
