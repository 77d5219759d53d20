"""``make quickstart`` in a reduced form: the same targets and commands, a tiny network and one epoch."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


def quickstart(out: Path) -> subprocess.CompletedProcess[str]:
    """Call the target for one epoch, and return what it says."""
    command = [
        "make",
        "--old-file=.venv/.installed",  # the interpreter that runs this test has everything already
        "quickstart",
        f"RUN={sys.executable}",
        f"QUICKSTART_OUT={out}",
        "SEEDS=1",
        "ARGS=model=tiny epochs=1 device=cpu",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def first(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """Return where the first call has written, and what it said."""
    out = tmp_path_factory.mktemp("quickstart")
    return out, quickstart(out)


def test_quickstart_trains_five_settings_and_draws_the_figure(first):
    """Five runs, one figure as PNG, SVG and CSV, a table, and the TensorBoard command."""
    out, done = first
    assert {path.name for path in out.glob("fig1.*")} == {"fig1.png", "fig1.svg", "fig1.csv"}
    assert len(list((out / "runs").rglob("run.json"))) == 5
    for name in ("baseline", "kfac", "sua", "grouped", "sua_grouped"):
        assert any(name in line.split() for line in done.stdout.splitlines()), name
    assert f"--logdir {out}/runs" in done.stdout


@pytest.mark.slow
def test_a_second_quickstart_trains_nothing(first):
    """The same command again."""
    assert quickstart(first[0]).stdout.count("already finished") == 5
