"""The whole campaign by the real command through Hydra's launchers, disturbed and not: the same tables in the end."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from campaign.test_campaign_faults import call, reproduce, wait_for
from campaign.test_reproduce import MEASURED_SECONDS
from tiny_runs import lock_holder

from kfac_sua.runs.run_info import ENDED, read_run_info

pytest.importorskip("submitit")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    """Carry out the campaign by this command's own workers."""
    out = tmp_path_factory.mktemp("undisturbed")
    result = call(reproduce(out))
    assert result.returncode == 0, result.stderr
    return out


def assert_same_tables(first: Path, second: Path) -> None:
    """Compare the records of two campaigns but for the measured seconds."""
    for name in ("grid_runs.csv", "final_runs.csv"):
        tables = [pd.read_csv(out / "report" / name) for out in (first, second)]
        kept = [column for column in tables[0] if not re.search(MEASURED_SECONDS, column)]
        pd.testing.assert_frame_equal(tables[0][kept], tables[1][kept])
        assert len(tables[0]) > 3


def grid_directories(undisturbed: Path, out: Path) -> list[Path]:
    """Return where the runs of the grid will lie below another directory."""
    return [out / path.parent.relative_to(undisturbed) for path in sorted((undisturbed / "grid").rglob("run.json"))]


def put_in_the_way(directory: Path) -> None:
    """Make a run raise: its records cannot be read."""
    directory.mkdir(parents=True)
    (directory / "run.json").write_text('{"status": "fin')


def test_submitit_one_job_killed_and_one_raising(undisturbed, tmp_path):
    """The others finish, the command names both, the same command does exactly these, and the tables are the same."""
    directories = grid_directories(undisturbed, tmp_path)
    raising, killed = directories[0], directories[-1]
    put_in_the_way(raising)
    command = reproduce(tmp_path, "--launcher", "submitit_local", "--jobs", "2")
    with subprocess.Popen(command, stdout=-1, stderr=-1, text=True) as process:
        lock = killed / ".lock"
        wait_for(lambda: lock.exists() and lock.read_text())
        os.kill(lock_holder(lock), signal.SIGKILL)
        out, errors = process.communicate(timeout=300)
    assert process.returncode == 1, errors
    assert f"2 of {len(directories)} runs failed: " in errors
    assert "is not valid JSON" in errors
    assert re.search(r"its job \d+ was killed or cancelled \(state \w+; its own log: .*_log\.err\)", errors)
    assert "The same command tries these again, and no other." in errors
    assert "Traceback" not in errors + out
    finished = [path for path in directories if path not in (raising, killed)]
    assert {read_run_info(path / "run.json").status for path in finished} <= set(ENDED)
    shown = call(reproduce(tmp_path, "--launcher", "submitit_local", "--jobs", "2", "--dry-run")).stdout
    assert f"grid: {len(directories)} runs, {len(finished)} done, 2 to do, 2 at a time" in shown
    (raising / "run.json").unlink()
    before = {path: (path / "run.json").stat().st_mtime_ns for path in finished}
    result = call(command)
    assert result.returncode == 0, result.stderr
    assert re.search(rf"grid: 2 of {len(directories)} runs to do, 2 at a time", result.stdout)
    assert {path: (path / "run.json").stat().st_mtime_ns for path in finished} == before
    assert_same_tables(undisturbed, tmp_path)


def test_joblib_one_run_raising(undisturbed, tmp_path):
    """The same with joblib, whose final runs are alone in processes of their own."""
    directories = grid_directories(undisturbed, tmp_path)
    put_in_the_way(directories[1])
    command = reproduce(tmp_path, "--launcher", "joblib", "--jobs", "2")
    result = call(command)
    assert result.returncode == 1
    assert f"1 of {len(directories)} runs failed: " in result.stderr
    (directories[1] / "run.json").unlink()
    result = call(command)
    assert result.returncode == 0, result.stderr
    assert f"grid: 1 of {len(directories)} runs to do, 2 at a time" in result.stdout
    assert "final runs: 1 of 1 runs to do, alone on the device" in result.stdout
    assert_same_tables(undisturbed, tmp_path)


@pytest.mark.parametrize("launcher", ["submitit_local", "joblib"])
def test_ctrl_c_cancels_the_jobs(tmp_path, launcher):
    """The driver alone hears it: no job is left behind, every directory is free, and the same command goes on."""
    command = reproduce(tmp_path, "--launcher", launcher, "--jobs", "2", "epochs=20000")
    with subprocess.Popen(
        command,
        stdout=-1,
        stderr=-1,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background shell ignores it
    ) as process:
        wait_for(lambda: len(list(tmp_path.rglob("checkpoint.state"))) == 2)
        jobs = [lock_holder(path) for path in (tmp_path / "grid").rglob(".lock")]
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "interrupted; the same command goes on where this one stopped." in errors
    assert "kfac_sua/" not in errors  # submitit's own process that watches over a job shows where Ctrl-C met it
    assert len(jobs) == 2
    wait_for(lambda: not any(_is_alive(pid) for pid in jobs), 20)
    logs = [path.read_text() for path in (tmp_path / "grid").rglob("log.txt")]
    if launcher == "submitit_local":  # joblib kills its processes, which lose what came after their last checkpoint
        assert all("interrupted; the same command resumes" in log for log in logs)


def test_a_sweep_through_submitit(tmp_path):
    """The training command's sweeps take the same launchers; a failure is one sentence and exit code 1."""
    base = [sys.executable, "-m", "kfac_sua.train", "-m", "hydra/launcher=submitit_local", "model=tiny", "device=cpu"]
    base += ["dataset.train_size=400", "epochs=1", "preconditioner=baseline", f"output_dir={tmp_path}"]
    result = call([*base, "dataset=digits", "optimizer.lr=0.1,0.2"])
    assert (result.returncode, result.stderr) == (0, "")
    assert len(list(tmp_path.rglob("run.json"))) == 2
    no_images = ["dataset=cifar10,digits", "dataset.download=false", f"dataset.data_dir={tmp_path}"]
    result = call([*base, *no_images, "optimizer.lr=0.3"])
    assert result.returncode == 1
    last = result.stderr.splitlines()[-1]
    assert "Some runs of the sweep failed, the first of them so: " in last
    assert "cifar10.npz does not exist" in last
    assert len(list(tmp_path.rglob("run.json"))) == 3


def test_a_killed_job_of_a_sweep_is_one_sentence(tmp_path):
    """Sweeps do not wait for the others, which go on by themselves."""
    command = [sys.executable, "-m", "kfac_sua.train", "-m", "hydra/launcher=submitit_local", "model=tiny"]
    command += ["dataset=digits", "epochs=50000", "preconditioner=baseline", "device=cpu", "seed=0", "num_threads=1"]
    with subprocess.Popen([*command, f"output_dir={tmp_path}"], stdout=-1, stderr=-1, text=True) as process:
        wait_for(lambda: list(tmp_path.rglob("checkpoint.state")))
        (lock,) = tmp_path.rglob(".lock")
        os.kill(lock_holder(lock), signal.SIGKILL)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 1, errors
    assert re.match(r"A job of the sweep was killed .* \(Job \d+ .*\); the same command starts what is", errors)
    assert errors.count("\n") == 1


def _is_alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False
