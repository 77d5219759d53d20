"""A structure that an installed package adds runs wherever the package's own do: ``tests/plugin`` is such a package."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PLUGIN = ROOT / "tests" / "plugin"
TINY = ("model=tiny", "device=cpu")

CAMPAIGN = """
name: outside
title: A structure from outside
figure: fig1
panels:
  - name: tiny
    curves:
      - {method: baseline, overrides: [model=tiny, dataset=digits, preconditioner=baseline], tuning: lr}
      - {method: diagonal, overrides: [model=tiny, dataset=digits, preconditioner=diagonal], tuning: lr_damping}
"""


def call(*arguments: str, cwd: Path = ROOT, has_plugin: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a command of the package beside the plug-in."""
    path = os.pathsep.join([*([str(PLUGIN)] if has_plugin else []), str(ROOT)])
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        env={**os.environ, "PYTHONPATH": path},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )


def test_the_plugin_is_as_small_as_promised():
    """A structure is one file of at most 60 lines."""
    assert len((PLUGIN / "diagonal_structure.py").read_text(encoding="utf-8").splitlines()) <= 60


def test_it_trains_by_its_name(tmp_path):
    """``preconditioner=NAME`` takes it, and records have its name."""
    options = ("dataset=digits", "dataset.train_size=200", "epochs=1", f"output_dir={tmp_path}", "progress=lines")
    trained = call("kfac_sua.train", "preconditioner=diagonal", *TINY, *options)
    assert trained.returncode == 0, trained.stderr
    assert "3 layers preconditioned (3 diagonal)" in trained.stdout + trained.stderr
    (info,) = (tmp_path / "digits-tiny-diagonal").rglob("run.json")
    assert json.loads(info.read_text())["config"]["preconditioner"]["structure"] == "diagonal"


@pytest.mark.slow
def test_its_cost_is_measured(tmp_path):
    """``--settings NAME`` takes it."""
    record = tmp_path / "bench.json"
    measured = call("kfac_sua.bench", "--settings", "diagonal", "--json", str(record), *TINY)
    assert measured.returncode == 0, measured.stderr
    assert "diagonal" in {cost["setting"] for cost in json.loads(record.read_text())["costs"]}


def test_without_its_package_the_name_is_unknown(tmp_path):
    """The error lists the structures that there are."""
    result = call("kfac_sua.train", "preconditioner=diagonal", *TINY, f"output_dir={tmp_path}", has_plugin=False)
    assert result.returncode == 2
    assert "diagonal" in result.stderr
    assert "eigenvalue_corrected" in result.stderr


@pytest.mark.slow
def test_a_campaign_of_ones_own_draws_it(tmp_path):
    """A campaign's file may lie anywhere, and its curves may have any structure."""
    file = tmp_path / "outside.yaml"
    file.write_text(CAMPAIGN, encoding="utf-8")
    options = ("--scale", "smoke", "--seeds", "1", "--jobs", "1", "--out", str(tmp_path / "out"))
    result = call("kfac_sua.reproduce", str(file), *options, "device=cpu")
    assert result.returncode == 0, result.stdout + result.stderr
    report = (tmp_path / "out" / "report" / "report.md").read_text(encoding="utf-8")
    assert "| diagonal |" in report
