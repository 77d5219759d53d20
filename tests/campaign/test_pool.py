"""Worker processes: runs side by side, one that fails, one that is killed, and Ctrl-C."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_runs import lock_holder, tiny_config

from kfac_sua.campaign.cell import Cell, Stage, log_path, read_state
from kfac_sua.campaign.pool import run_all
from kfac_sua.campaign.starting import METHOD
from kfac_sua.campaign.worker import Task
from kfac_sua.runs.directory import run_directory

ROOT = Path(__file__).resolve().parents[2]


def make_cell(root: Path, lr: float, *overrides: str) -> Cell:
    """Return a tiny run without a preconditioner."""
    config = tiny_config(root, "preconditioner=baseline", *overrides)
    config.optimizer.lr = lr
    return Cell(Stage.grid, "panel", "baseline", (), config, run_directory(config, "cpu"))


def carry_out(cells: list[Cell], **options) -> dict[str, str | None]:
    """Carry out runs and return how each ended."""
    ends: dict[str, str | None] = {}
    options = {"jobs": 2, "reuse": True, "on_tick": lambda running: None} | options
    run_all(
        cells,
        lambda cell: Task(cell.config, log_path(cell), 1),
        on_end=lambda c, r: ends.update({c.name: r}),
        **options,
    )
    return ends


def test_a_run_that_fails_does_not_stop_the_others(tmp_path):
    """The reason comes back in a sentence, the log holds what was printed, the others finish."""
    good = [make_cell(tmp_path, lr, "epochs=1") for lr in (0.1, 0.2)]
    no_images = ("dataset=cifar10", "dataset.download=false", f"dataset.data_dir={tmp_path}")
    bad = make_cell(tmp_path, 0.3, "epochs=1", *no_images)
    ends = carry_out([bad, *good])
    assert [ends[cell.name] for cell in good] == [None, None]
    assert "cifar10" in str(ends[bad.name]).lower()
    assert all(read_state(cell).status == "finished" for cell in good)
    assert "finished: epoch 1" in log_path(good[0]).read_text()
    assert "Traceback" in log_path(bad).read_text()


def test_a_worker_that_is_killed_is_named_and_replaced(tmp_path):
    """SIGKILL, as from the kernel when memory runs out, ends one run; the next gets a new process."""
    long, after = make_cell(tmp_path, 0.1, "epochs=5000"), make_cell(tmp_path, 0.2, "epochs=1")

    def kill_once_begun(running: list[Cell]) -> None:
        if long in running and read_state(long).epochs > 0:
            os.kill(lock_holder(long.directory.path / ".lock"), signal.SIGKILL)

    ends = carry_out([long, after], jobs=1, on_tick=kill_once_begun)
    assert "killed by signal 9" in str(ends[long.name])
    assert ends[after.name] is None


@pytest.mark.skipif(METHOD != "forkserver", reason="each process is started by this one")
def test_without_the_process_that_others_are_copied_from_the_next_run_has_a_new_one(tmp_path):
    """It alone learns how a worker ends: where both are killed, the reason says so."""
    long, after = make_cell(tmp_path, 0.1, "epochs=5000"), make_cell(tmp_path, 0.2, "epochs=1")

    def kill_both(running: list[Cell]) -> None:
        if long in running and read_state(long).epochs > 0:
            worker = lock_holder(long.directory.path / ".lock")
            (copied,) = [
                pid for pid, parent in _parents().items() if worker in _children(pid) and parent == os.getpid()
            ]
            os.kill(copied, signal.SIGKILL)
            os.kill(worker, signal.SIGKILL)

    ends = carry_out([long, after], jobs=1, on_tick=kill_both)
    assert "has ended, and so has the one that would know how" in str(ends[long.name])
    assert ends[after.name] is None


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_everything_goes_with_the_command(tmp_path, how):
    """However it ends, no process is left, and the directory of a run is free; whoever is asked to stop saves.

    Ctrl-C reaches all processes of a terminal, and so does the SIGTERM of some schedulers.
    """
    command = [sys.executable, "-m", "kfac_sua.reproduce", "fig1", "--scale", "smoke", "--only", "baseline"]
    command += ["--jobs", "2", "--out", str(tmp_path), "device=cpu", "epochs=5000", "checkpoint_interval_s=null"]
    pipes = {"stderr": subprocess.PIPE, "stdout": subprocess.DEVNULL, "text": True}
    with subprocess.Popen(command, cwd=ROOT, start_new_session=True, **pipes) as parent:
        deadline = time.monotonic() + 120
        while len(workers := _lock_holders(tmp_path)) < 2 and time.monotonic() < deadline:
            time.sleep(0.2)
        everything = _descendants(parent.pid)
        if how is signal.SIGKILL:
            parent.kill()
        else:
            os.killpg(parent.pid, how)
        _, errors = parent.communicate(timeout=60)
    assert len(workers) == 2
    assert workers < everything
    if how is not signal.SIGKILL:
        assert parent.returncode == 128 + how
        assert errors.endswith("interrupted; the same command goes on where this one stopped.\n")
        assert "Traceback" not in errors
    deadline = time.monotonic() + 20
    while any(map(_is_alive, everything)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(_is_alive, everything))
    logs = [path.read_text() for path in tmp_path.rglob("log.txt")]
    assert sum("interrupted; the same command resumes" in log for log in logs) == 2


def _lock_holders(root: Path) -> set[int]:
    """Return the processes that have written an epoch of some run."""
    paths = [path.with_name(".lock") for path in root.rglob("metrics.csv")]
    return {lock_holder(path) for path in paths if path.exists() and path.read_text()}


def _descendants(pid: int) -> set[int]:
    """Return the processes that a process has started, those that these have started, and so on."""
    return {found for child in _children(pid) for found in {child} | _descendants(child)}


def _children(pid: int) -> set[int]:
    return {child for child, parent in _parents().items() if parent == pid}


def _parents() -> dict[int, int]:
    """Return the parent of every process."""
    lines = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    return {int(pid): int(parent) for pid, parent in map(str.split, lines.splitlines())}


def _is_alive(pid: int) -> bool:
    """Say whether a process runs; one that has ended and waits for its parent does not."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False
