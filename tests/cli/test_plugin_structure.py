"""A structure that an installed package adds runs wherever the package's own do: ``tests/plugin`` is such a package."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import kfac_sua
from kfac_sua.compose import compose_config, quoted
from kfac_sua.compose.saved import saved_overrides
from kfac_sua.config import ConfigError, to_plain
from kfac_sua.training.loop import run

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


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The directory of a run with the structure."""
    root = tmp_path_factory.mktemp("trained")
    options = ("dataset=digits", "dataset.train_size=200", "epochs=1", f"output_dir={root}", "progress=lines")
    trained = call("kfac_sua.train", "preconditioner=diagonal", *TINY, *options)
    assert trained.returncode == 0, trained.stderr
    assert "3 layers preconditioned (3 diagonal)" in trained.stdout + trained.stderr
    (info,) = (root / "digits-tiny-diagonal").rglob("run.json")
    return info.parent


def test_it_trains_by_its_name(trained):
    """``preconditioner=NAME`` takes it, and records have its name."""
    info = json.loads((trained / "run.json").read_text(encoding="utf-8"))
    assert info["config"]["preconditioner"]["structure"] == "diagonal"


def test_without_its_package_the_network_can_be_used(trained):
    """Weights and data need no preconditioner; the configuration keeps its name."""
    result = call("kfac_sua.evaluate", str(trained), "--device", "cpu", has_plugin=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout == call("kfac_sua.evaluate", str(trained), "--device", "cpu").stdout
    loaded = kfac_sua.load_run(trained)  # this process has no plug-in
    assert to_plain(loaded.config.preconditioner) == {"name": "diagonal"}
    assert loaded.info.config["preconditioner"]["structure"] == "diagonal"


def test_without_its_package_it_cannot_be_trained_with_again(trained, tmp_path):
    """The error says what is missing and how to get on; another preconditioner may take its place."""
    with pytest.raises(ConfigError, match=r"comes from a package that cannot be used here .* got 'diagonal'"):
        saved_overrides(trained)
    assert compose_config(saved_overrides(trained, ["preconditioner=kfac"])).preconditioner.name == "kfac"
    overrides = saved_overrides(
        trained, ["preconditioner=kfac", f"start_from={quoted(str(trained))}", f"output_dir={tmp_path}"]
    )
    with pytest.raises(ConfigError, match=r"preconditioner.name was 'diagonal' and is 'kfac'"):
        run(compose_config([*overrides, "epochs=2"]))


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
