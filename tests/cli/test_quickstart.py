"""``make quickstart`` in a reduced form: the same targets and commands, a tiny network and one epoch."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_quickstart_trains_five_settings_and_draws_the_figure(tmp_path):
    """Five runs, one figure as PNG, SVG and CSV, a table, and the TensorBoard command; a second call trains nothing."""
    command = [
        "make",
        "--old-file=.venv/.installed",  # the interpreter that runs this test has everything already
        "quickstart",
        f"RUN={sys.executable}",
        f"QUICKSTART_OUT={tmp_path}",
        "SEEDS=1",
        "ARGS=model=tiny epochs=1 device=cpu",
    ]
    first = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert first.returncode == 0, first.stdout + first.stderr
    assert {path.name for path in tmp_path.glob("fig1.*")} == {"fig1.png", "fig1.svg", "fig1.csv"}
    assert len(list((tmp_path / "runs").rglob("run.json"))) == 5
    for name in ("baseline", "kfac", "sua", "grouped", "sua_grouped"):
        assert any(name in line.split() for line in first.stdout.splitlines()), name
    assert f"--logdir {tmp_path}/runs" in first.stdout
    second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert second.returncode == 0, second.stdout + second.stderr
    assert second.stdout.count("already finished") == 5
