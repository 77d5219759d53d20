"""The whole campaign by the real command: uninterrupted, killed and resumed, and its words."""

import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pandas as pd
import pytest

from kfac_sua.reproduce import main

ROOT = Path(__file__).resolve().parents[2]
# Everything else in the tables is the same whatever the machine does.
MEASURED_SECONDS = r"_s$|seconds"


def command(out: Path, *arguments: str) -> list[str]:
    """Return the command of the smallest campaign for Figure 1, with three of its five curves."""
    base = [sys.executable, "-m", "kfac_sua.reproduce", "fig1", "--scale", "smoke", "--seeds", "1", "--jobs", "1"]
    return [*base, "--only", "baseline,kfac,sua", "--out", str(out), *arguments, "device=cpu"]


def call(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command to its end."""
    return subprocess.run(command(out, *arguments), cwd=ROOT, capture_output=True, text=True, timeout=400, check=False)


@pytest.fixture(scope="module")
def campaigns(tmp_path_factory) -> tuple[Path, Path, list[int]]:
    """Carry out the campaign twice at the same time: in one go, and killed again and again.

    Returns:
        Both directories, and how many runs had ended at each kill.
    """
    whole, killed = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("killed")
    with subprocess.Popen(command(whole), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as one:
        ended_at_kill = [_run_and_kill(killed, num_runs) for num_runs in (12, 24)]  # in the grid, in the final runs
        result = call(killed)
        assert result.returncode == 0, result.stdout + result.stderr
        output, _ = one.communicate(timeout=400)
        assert one.returncode == 0, output
    return whole, killed, ended_at_kill


def _run_and_kill(out: Path, num_runs: int) -> int:
    """Start the campaign, kill it by SIGKILL once as many runs have begun, and return how many had ended."""
    with subprocess.Popen(command(out), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 200
        while len(list(out.rglob("metrics.csv"))) < num_runs and time.monotonic() < deadline:
            assert process.poll() is None, "the campaign ended before it was killed"
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    return len(list(out.rglob("log.txt")))


@pytest.mark.slow
def test_killed_campaign_ends_with_the_same_tables(campaigns):
    """All records but the measured seconds are those of the uninterrupted campaign."""
    whole, killed, _ = campaigns
    for name in ("grid_runs.csv", "final_runs.csv"):
        tables = [pd.read_csv(out / "report" / name) for out in (whole, killed)]
        kept = [column for column in tables[0] if not re.search(MEASURED_SECONDS, column)]
        pd.testing.assert_frame_equal(tables[0][kept], tables[1][kept])
        assert len(tables[0]) > 10


@pytest.mark.slow
def test_no_run_is_started_twice(campaigns):
    """Every log has one start, and only runs that a kill met in the middle have another entry."""
    _, killed, ended_at_kill = campaigns
    logs = [path.read_text() for path in killed.rglob("log.txt")]
    assert len(logs) > max(ended_at_kill)
    assert all(log.count("\nfinished: ") + log.startswith("finished: ") == 1 for log in logs)
    begun_again = [log for log in logs if len(re.findall("^(?:started|resumed) on", log, re.MULTILINE)) > 1]
    assert len(begun_again) <= len(ended_at_kill)  # one worker, so at most one run per kill


@pytest.mark.slow
def test_report_has_its_figures_and_numbers(campaigns):
    """Everything that a reader needs lies in one directory."""
    whole, _, _ = campaigns
    files = {path.name: path.stat().st_size for path in (whole / "report").iterdir()}
    for figure in ("fig1", "grid", "time_to_target", "time_split"):
        assert all(files[f"{figure}.{suffix}"] > 100 for suffix in ("png", "svg", "csv"))
    text = (whole / "report" / "report.md").read_text()
    assert all(claim in text for claim in ("C1", "C2", "C3"))
    assert "undecided" in text  # a single seed decides nothing
    assert "python -m kfac_sua.reproduce fig1 --scale smoke" in text
    assert files["report.html"] > files["report.md"]


@pytest.mark.slow
def test_dry_run_of_a_finished_campaign_says_so(campaigns, capsys):
    """Every run is counted as done, nothing is left, and nothing is written."""
    whole, _, _ = campaigns
    before = sorted(whole.rglob("*"))
    assert main([*command(whole, "--dry-run")[3:]]) == 0
    output = capsys.readouterr().out
    assert re.search(r"grid: (\d+) runs, \1 done, 0 to do", output)
    assert "final runs: 3 runs, 3 done, 0 to do" in output
    assert sorted(whole.rglob("*")) == before


@pytest.mark.slow
def test_a_missing_final_run_is_carried_out_again(campaigns, tmp_path):
    """A run that someone removed is the only one that runs, and the tables are the same again."""
    _, killed, _ = campaigns
    before = pd.read_csv(killed / "report" / "final_runs.csv")
    victim = next((killed / "final").rglob("run.json")).parent
    shutil.rmtree(victim)
    result = call(killed)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "1 of 3 runs to do" in result.stdout
    after = pd.read_csv(killed / "report" / "final_runs.csv")
    kept = [column for column in before if not re.search(MEASURED_SECONDS, column)]
    pd.testing.assert_frame_equal(before[kept], after[kept])


@pytest.mark.slow
def test_a_finished_run_that_lost_epochs_is_refused(campaigns):
    """Means over fewer epochs than were trained would be wrong numbers."""
    _, killed, _ = campaigns
    metrics = next((killed / "final").rglob("metrics.csv"))
    intact = metrics.read_text()
    metrics.write_text("".join(intact.splitlines(keepends=True)[:-1]))
    result = call(killed)
    metrics.write_text(intact)
    assert result.returncode == 1
    assert "1 of 1 runs failed" in result.stderr
    assert "is not as it was at the end of the run" in result.stderr
    assert str(metrics.parent) in result.stderr


@pytest.mark.parametrize(
    ("scale", "grid", "final"),
    [("smoke", 20, 15), pytest.param("small", 60, 15, marks=pytest.mark.slow)],  # whose first steps take a minute
)
def test_dry_run_before_anything_counts_and_estimates(tmp_path, capsys, scale, grid, final):
    """Runs to come, the stages, and a time where the scale brings one; no directory is made."""
    out = tmp_path / "nothing"
    assert main(["fig1", "--scale", scale, "--dry-run", "--out", str(out), "device=cpu"]) == 0
    output = capsys.readouterr().out
    assert f"grid: {grid} runs, 0 done, {grid} to do" in output
    assert f"final runs: {final} runs, 0 done, {final} to do, alone on the device: about " in output
    assert "unknown" not in output
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "adam"], "has no method 'adam'"),
        (["optimizer.lrr=3"], "optimizer.lrr"),
        (["epochs=0"], "epochs must be ≥ 1"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path, capsys, arguments, message):
    """A typo ends with exit code 2 before anything is written."""
    out = tmp_path / "out"
    assert main(["fig1", "--scale", "smoke", "--out", str(out), *arguments[:1], *arguments[1:]]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not out.exists()


@pytest.mark.parametrize(("arguments", "environment"), [(["--debug"], "0"), ([], "1")], ids=["option", "environment"])
def test_debug_shows_where_an_error_arises(tmp_path, capsys, monkeypatch, arguments, environment):
    """The traceback instead of the sentence, and the same exit code."""
    monkeypatch.setenv("HYDRA_FULL_ERROR", environment)
    assert main(["fig1", "--scale", "smoke", "--out", str(tmp_path / "out"), "epochs=0", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("Traceback")
    assert "ConfigError: epochs must be" in error


def test_failed_runs_end_with_their_names(tmp_path, capsys):
    """A setting that only the network can refuse fails in the runs; the command says which, and exits with 1."""
    arguments = ["--scale", "smoke", "--only", "sua", "--jobs", "1", "--out", str(tmp_path)]
    assert main(["fig1", *arguments, "device=cpu", "preconditioner.skip=[nonsense]"]) == 1
    error = capsys.readouterr().err
    assert "4 of 4 runs failed" in error
    assert "grid vgg11/sua lr=0.03 damping=0.1 seed=0: preconditioner.skip" in error
    assert "log.txt" in error


@pytest.mark.parametrize("download", ["true", "false"])
def test_missing_images_are_noticed_before_the_first_run(tmp_path, capsys, monkeypatch, download):
    """One sentence instead of one failure per run, whether or not they may be fetched."""
    requests = []

    def refuse(request):
        requests.append(request.full_url)
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    out = tmp_path / "out"
    overrides = ["device=cpu", f"dataset.data_dir={tmp_path / 'no-data'}", f"dataset.download={download}"]
    overrides += ["--only", "baseline"]  # all curves have the same images
    assert main(["fig1", "--scale", "small", "--out", str(out), *overrides]) == 2
    error = capsys.readouterr().err
    assert ("could not be downloaded" if download == "true" else "make data") in error
    assert bool(requests) == (download == "true")
    assert error.count("\n") == 1
    assert not list(out.rglob("log.txt"))
