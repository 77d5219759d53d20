"""Runs as jobs of Hydra's launchers: one that raises, one that is killed, pre-emption, Ctrl-C; the others go on."""

import os
import re
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_runs import TINY, directory_of, lock_holder, metrics_without_times, tiny_config

from kfac_sua.campaign.cell import Cell, Stage, log_path, read_state
from kfac_sua.campaign.jobs import run_as_jobs
from kfac_sua.campaign.launcher import load_launcher
from kfac_sua.files.lock import exclusive
from kfac_sua.runs.run_info import read_run_info
from kfac_sua.training.loop import run

submitit_core = pytest.importorskip("submitit.core.core")


def make_cell(root: Path, lr: float, *overrides: str) -> Cell:
    """Return a tiny run without a preconditioner, with what a job composes it from."""
    arguments = ("preconditioner=baseline", f"optimizer.lr={lr}", *overrides)
    config = tiny_config(root, *arguments)
    return Cell(
        Stage.grid, "panel", "baseline", (*TINY, f"output_dir={root}", *arguments), config, directory_of(config)
    )


def carry_out(cells: list[Cell], root: Path, name: str = "submitit_local", jobs: int = 2) -> dict[str, str | None]:
    """Carry out runs as jobs and return how each ended that was begun."""
    ends: dict[str, str | None] = {}
    launcher = load_launcher(name, [], jobs)
    run_as_jobs(
        cells,
        launcher,
        root,
        jobs=jobs,
        num_threads=1,
        on_end=lambda cell, reason: ends.update({cell.name: reason}),
        on_tick=lambda running: None,
    )
    return ends


def once_begun(cell: Cell, action: Callable[[int], None]) -> threading.Thread:
    """Start a thread that does something with the process of a run once it has completed an epoch."""

    def wait() -> None:
        deadline = time.monotonic() + 120
        while read_state(cell).epochs == 0 and time.monotonic() < deadline:
            time.sleep(0.02)
        action(lock_holder(cell.directory.path / ".lock"))

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


@pytest.mark.slow
def test_of_three_jobs_one_raises_one_is_killed_and_one_finishes(tmp_path, monkeypatch):
    """Both are named, the killed one with its job's own log, and the other ends as if alone."""
    monkeypatch.setattr(submitit_core.Job, "_results_timeout_s", 0.2)
    no_images = ("dataset=cifar10", "dataset.download=false", f"dataset.data_dir={tmp_path}")
    killed, raising, good = (
        make_cell(tmp_path, 0.1, "epochs=50000"),
        make_cell(tmp_path, 0.2, "epochs=1", *no_images),
        make_cell(tmp_path, 0.3, "epochs=1"),
    )
    thread = once_begun(killed, lambda pid: os.kill(pid, signal.SIGKILL))
    ends = carry_out([killed, raising, good], tmp_path)
    thread.join()
    assert ends[good.name] is None
    assert read_state(good).status == "finished"
    assert "cifar10.npz does not exist" in str(ends[raising.name])
    said = re.fullmatch(r"its job \d+ was killed or cancelled \(state \w+; its own log: (.*)\)", str(ends[killed.name]))
    assert said
    assert "Starting with JobEnvironment" in Path(said[1].replace(".err", ".out")).read_text()
    assert "finished: epoch 1" in log_path(good).read_text()
    assert len(list((tmp_path / ".jobs").iterdir())) == 1  # files of the batch without a failure are gone
    with exclusive(killed.directory.path):
        assert read_state(killed).status == "running"


@pytest.mark.slow
def test_a_pre_empted_job_is_queued_again_and_goes_on_from_its_checkpoint(tmp_path):
    """SIGUSR2, as Slurm sends it: the same job comes back, finds the lock free, and ends as an undisturbed run."""
    straight = tiny_config(tmp_path / "straight", "preconditioner=baseline", "optimizer.lr=0.1", "epochs=100")
    run(straight)
    cell = make_cell(tmp_path, 0.1, "epochs=100", "checkpoint_interval_s=null")
    thread = once_begun(cell, lambda pid: os.kill(pid, signal.SIGUSR2))
    assert carry_out([cell], tmp_path) == {cell.name: None}
    thread.join()
    log = log_path(cell).read_text()
    assert re.search(r"interrupted; the same command resumes .*\n(.*\n)*resumed on cpu", log)
    assert metrics_without_times(cell.config) == metrics_without_times(straight)
    assert len(read_run_info(cell.directory.info).machines) == 1


@pytest.mark.slow
def test_joblib_ends_with_a_killed_process_and_says_which_runs_it_had_begun(tmp_path):
    """Runs that were not begun have not failed, and all are left for the next command."""
    killed, beside = make_cell(tmp_path, 0.1, "epochs=50000"), make_cell(tmp_path, 0.2, "epochs=50000")
    after = [make_cell(tmp_path, lr, "epochs=1") for lr in (0.3, 0.4)]
    thread = once_begun(killed, lambda pid: os.kill(pid, signal.SIGKILL))
    ends = carry_out([killed, beside, *after], tmp_path, "joblib")
    thread.join()
    reason = "a process of joblib was killed (out of memory?), which ends all others"
    assert ends == {killed.name: reason, beside.name: reason}
    assert carry_out(after, tmp_path, "joblib") == {cell.name: None for cell in after}
