"""What a campaign meets: full disks, damaged files, killed workers, two commands at once. The other runs go on."""

import contextlib
import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from campaign.test_pool import ROOT, carry_out, make_cell
from full_disk import fill, largest_file, small_disk
from tiny_runs import lock_holder, metrics_without_times

from kfac_sua.campaign.cell import Cell, log_path, mark_failed, read_state
from kfac_sua.files.lock import exclusive
from kfac_sua.runs.run_info import ENDED, read_run_info

BASELINE_ONLY = ("fig1", "--scale", "smoke", "--only", "baseline", "--seeds", "1")


def reproduce(out: Path, *arguments: str) -> list[str]:
    """Return the command of a campaign of a few runs."""
    return [sys.executable, "-m", "kfac_sua.reproduce", *BASELINE_ONLY, "--out", str(out), *arguments, "device=cpu"]


def call(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


def wait_for(condition: Callable[[], object], seconds: float = 120) -> None:
    """Wait until something holds, and fail if it does not."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.02)


def once(cell: Cell, action: Callable[[], None]) -> Callable[[list[Cell]], None]:
    """Return what does something as soon as a run has completed an epoch, and only then."""
    done: list[bool] = []

    def on_tick(running: list[Cell]) -> None:
        if cell in running and not done and read_state(cell).epochs > 0:
            done.append(True)
            action()

    return on_tick


def test_directory_that_cannot_be_written_fails_one_run(tmp_path):
    """A file in the place of its directory: not even its log can be opened, and the worker goes on all the same."""
    bad, good = make_cell(tmp_path, 0.1, "epochs=1"), make_cell(tmp_path, 0.2, "epochs=1")
    bad.directory.path.parent.mkdir(parents=True)
    bad.directory.path.write_text("in the way")
    ends = carry_out([bad, good], jobs=1)
    assert re.fullmatch(rf"Cannot use {re.escape(str(bad.directory.path))}.*: .*\.", str(ends[bad.name]))
    assert ends[good.name] is None


def test_out_of_memory_fails_one_run(tmp_path):
    """A batch too large for what the process may use: the run ends as failed with the bytes, the next one goes on."""
    first, after = make_cell(tmp_path, 0.1, "epochs=30"), make_cell(tmp_path, 0.3, "epochs=1")
    large = make_cell(tmp_path, 0.2, "epochs=1", "model.width=64", "batch_size=400")

    def limit() -> None:
        pid = lock_holder(first.directory.path / ".lock")
        size = int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * resource.getpagesize()
        resource.prlimit(pid, resource.RLIMIT_AS, (size + 300 * 2**20, resource.RLIM_INFINITY))

    # The limit is that of a worker in the middle of its first run, as what PyTorch itself needs differs by machine.
    ends = carry_out([first, large, after], jobs=1, on_tick=once(first, limit))
    assert (ends[first.name], ends[after.name]) == (None, None)
    reason = r"Out of memory \(asked for \d+ bytes\); lower batch_size or model.width."
    assert re.fullmatch(reason, str(ends[large.name]))
    info = read_run_info(large.directory.info)
    assert (info.status, info.failure) == ("failed", ends[large.name])


@pytest.mark.slow
def test_full_disk_fails_a_run_and_a_later_command_finishes_it(tmp_path):
    """ENOSPC in the middle of training: no torn file, no temporary file, and the same numbers in the end."""
    whole = make_cell(tmp_path / "whole", 0.1, "epochs=60")
    with small_disk(tmp_path / "disk", 400):
        cell = make_cell(tmp_path / "disk", 0.1, "epochs=60")
        ends = carry_out([cell], jobs=1, on_tick=once(cell, lambda: fill(tmp_path / "disk")))
        assert "No space left on device" in str(ends[cell.name])
        assert not list(cell.directory.path.glob("*.tmp"))
        assert not read_state(cell).has_ended
        (tmp_path / "disk" / "ballast").unlink()
        mark_failed(cell, str(ends[cell.name]))
        assert "No space left" in str(read_run_info(cell.directory.info).failure)
        assert carry_out([cell, whole], jobs=1) == {cell.name: None}  # they have one name
        info = read_run_info(cell.directory.info)
        assert (info.status, info.failure) == ("finished", None)
        assert "resumed on cpu" in log_path(cell).read_text()
        assert metrics_without_times(cell.config) == metrics_without_times(whole.config)


@pytest.mark.slow
def test_directory_removed_while_training_fails_the_run(tmp_path):
    """Someone tidies up too early: the run says so, the next goes on, and the same command starts it anew."""
    victim, after = make_cell(tmp_path, 0.1, "epochs=5000"), make_cell(tmp_path, 0.2, "epochs=1")
    remove = once(victim, lambda: shutil.rmtree(victim.directory.path, ignore_errors=True))
    ends = carry_out([victim, after], jobs=1, on_tick=remove)
    reasons = (
        r"Cannot use .*: No such file or directory\.|.* was removed or replaced; this process writes nothing more\."
    )
    assert re.match(reasons, str(ends[victim.name]))
    assert ends[after.name] is None
    again = make_cell(tmp_path, 0.1, "epochs=1")
    assert carry_out([again], jobs=1) == {again.name: None}


def test_killed_worker_leaves_a_failed_run_with_its_reason(tmp_path):
    """SIGKILL gives a run no time to say why it ended: the parent writes it, and the same command goes on."""
    long = make_cell(tmp_path, 0.1, "epochs=5000")
    kill = once(long, lambda: os.kill(lock_holder(long.directory.path / ".lock"), signal.SIGKILL))
    ends = carry_out([long], jobs=1, on_tick=kill)
    assert read_state(long).status == "running"
    mark_failed(long, str(ends[long.name]))
    state = read_state(long)
    assert (state.status, state.failure) == ("failed", "its process was killed by signal 9 (out of memory?)")
    assert state.epochs > 0


def test_stopped_worker_writes_a_checkpoint(tmp_path):
    """SIGTERM from anywhere: the run stops after a step, says where it goes on, and no traceback is printed."""
    long = make_cell(tmp_path, 0.1, "epochs=5000")
    stop = once(long, lambda: os.kill(lock_holder(long.directory.path / ".lock"), signal.SIGTERM))
    ends = carry_out([long], jobs=1, on_tick=stop)
    assert ends == {long.name: "its process was stopped by signal 15, after a checkpoint"}
    log = log_path(long).read_text()
    assert "the same command resumes" in log
    assert "Traceback" not in log


def test_ctrl_c_lets_workers_save_what_they_did(tmp_path):
    """The parent stops its workers by SIGTERM and waits for their checkpoints."""
    long = make_cell(tmp_path, 0.1, "epochs=5000", "checkpoint_interval_s=null")

    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        carry_out([long], jobs=1, on_tick=once(long, interrupt))
    assert multiprocessing.active_children() == []
    assert "interrupted; the same command resumes" in log_path(long).read_text()
    with exclusive(long.directory.path):
        assert read_state(long).status == "running"


@pytest.mark.slow
def test_a_run_still_held_by_another_process_is_waited_for(tmp_path):
    """The worker of a parent that was killed needs a moment to save: the next command does not fail on it."""
    cell = make_cell(tmp_path, 0.1, "epochs=1")
    held = contextlib.ExitStack()
    held.enter_context(exclusive(cell.directory.path))
    cell.directory.info.parent.mkdir(exist_ok=True)
    started = time.monotonic()
    ticks: list[float] = []

    def release(running: list[Cell]) -> None:
        ticks.append(time.monotonic())
        if ticks[-1] - started > 8:
            held.close()

    assert carry_out([cell], jobs=1, on_tick=release) == {cell.name: None}
    assert ticks[-1] - started > 8


@pytest.mark.parametrize("status", ["finished", "running"])
def test_only_runs_that_no_one_holds_are_marked(tmp_path, status):
    """A run that has ended, is in progress elsewhere or was never started keeps its record."""
    cell = make_cell(tmp_path, 0.1, "epochs=1")
    mark_failed(cell, "no reason")
    assert not cell.directory.path.exists()
    assert carry_out([cell], jobs=1) == {cell.name: None}
    content = json.loads(cell.directory.info.read_text()) | {"status": status}
    cell.directory.info.write_text(json.dumps(content))
    with exclusive(cell.directory.path) if status == "running" else contextlib.nullcontext():
        mark_failed(cell, "no reason")
    assert json.loads(cell.directory.info.read_text()) == content


@pytest.mark.slow
def test_failed_runs_are_retried_and_no_other(tmp_path):
    """Two damaged runs of a grid: the others are carried out, the command names both, and the next tries these."""
    assert "to do" in call(reproduce(tmp_path, "--dry-run")).stdout
    assert call(reproduce(tmp_path)).returncode == 0
    first, second, *others = sorted((tmp_path / "grid").rglob("run.json"))
    assert len(others) > 0
    first.write_text('{"status": "fin')
    second.with_name("metrics.csv").write_text("not,a,record\n")
    before = {path: path.stat().st_mtime_ns for path in others}
    shown = call(reproduce(tmp_path, "--dry-run"))
    assert len(re.findall(r": failed: .*, will be retried", shown.stdout)) == 2
    result = call(reproduce(tmp_path))
    assert result.returncode == 1
    assert re.match(r"2 of 2 runs failed: ", result.stderr)
    assert "is not valid JSON" in result.stderr
    assert "The same command tries these again, and no other." in result.stderr
    assert "Traceback" not in result.stderr + result.stdout
    shutil.rmtree(first.parent)
    shutil.rmtree(second.parent)
    result = call(reproduce(tmp_path))
    assert result.returncode == 0, result.stderr
    assert f"2 of {2 + len(others)} runs to do" in result.stdout
    assert {path: path.stat().st_mtime_ns for path in others} == before


@pytest.mark.slow
def test_every_run_may_fail_and_the_campaign_still_comes_to_its_end(tmp_path):
    """No checkpoint can be written: all runs end as failed with the reason, and the same command finishes them."""
    with largest_file(20_000):
        result = call(reproduce(tmp_path, "--jobs", "1"))
    assert result.returncode == 1, result.stderr
    num_runs = len(list(tmp_path.rglob("run.json")))
    assert num_runs > 1
    assert f"{num_runs} of {num_runs} runs failed" in result.stderr
    assert "File too large" in result.stderr
    assert result.stdout.count(": failed: Cannot use ") == num_runs
    infos = [read_run_info(path) for path in tmp_path.rglob("run.json")]
    assert {info.status for info in infos} == {"failed"}
    assert all("File too large" in str(info.failure) for info in infos)
    assert not list(tmp_path.rglob("*.tmp"))
    shown = call(reproduce(tmp_path, "--dry-run")).stdout
    assert len(re.findall(r": failed: Cannot use .*: File too large, will be retried", shown)) == num_runs
    result = call(reproduce(tmp_path, "--jobs", "1"))
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_of_two_campaigns_that_start_together_one_leaves(tmp_path):
    """Ten times over: the second says who is at work and exits with 1, and the first finishes as if alone."""
    for attempt in range(10):
        command = reproduce(tmp_path, "--jobs", "1")
        pair = [subprocess.Popen(command, cwd=ROOT, stdout=-1, stderr=-1, text=True) for _ in range(2)]
        wait_for(lambda pair=pair: any(process.poll() is not None for process in pair))
        (second,) = [process for process in pair if process.poll() is not None]
        _, errors = second.communicate()
        assert second.returncode == 1, errors
        assert re.fullmatch(r".* is being worked on by (process \d+|another process); wait for it.*\.\n", errors)
        (first,) = [process for process in pair if process is not second]
        if attempt < 9:
            first.send_signal(signal.SIGTERM)
        _, errors = first.communicate(timeout=300)
        assert first.returncode == (143 if attempt < 9 else 0), errors
        assert "Traceback" not in errors
    assert {read_run_info(path).status for path in tmp_path.rglob("run.json")} <= set(ENDED)


@pytest.mark.slow
def test_of_two_commands_for_one_run_one_leaves(tmp_path):
    """The second exits with a sentence, whatever instant the two reach, and the run is that of one alone."""
    command = [sys.executable, "-m", "kfac_sua.train", "model=tiny", "dataset=digits", "dataset.train_size=400"]
    command += ["device=cpu", "num_threads=1", "progress=none", "preconditioner=baseline", "epochs=5000"]
    command.append(f"output_dir={tmp_path}")
    for _ in range(3):
        pair = [subprocess.Popen(command, cwd=ROOT, stdout=-1, stderr=-1, text=True) for _ in range(2)]
        wait_for(lambda pair=pair: any(process.poll() is not None for process in pair))
        (second,) = [process for process in pair if process.poll() is not None]
        _, errors = second.communicate()
        assert second.returncode == 1, errors
        assert re.fullmatch(r".* is being trained by (process \d+|another process); wait for it.*\.\n", errors)
        (first,) = [process for process in pair if process is not second]
        wait_for(lambda: list(tmp_path.rglob("checkpoint.state")))
        first.send_signal(signal.SIGTERM)
        _, errors = first.communicate(timeout=60)
        assert first.returncode == 143, errors
