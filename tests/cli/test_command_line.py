"""The training command end to end: real processes, and sweeps as Hydra runs them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from thinned import one_in

from kfac_sua import train
from kfac_sua.compose import compose_cells
from kfac_sua.files.lock import RunBusyError, exclusive
from kfac_sua.runs.metrics import read_records

TINY = ["model=tiny", "dataset=digits", "dataset.train_size=400", "device=cpu"]


def start(*arguments: str, cwd: Path) -> subprocess.Popen[str]:
    """Start ``python -m kfac_sua.train`` with a tiny model in ``cwd``."""
    environment = {name: value for name, value in os.environ.items() if name != "HYDRA_FULL_ERROR"}
    return subprocess.Popen(
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background shell ignores it
        args=[sys.executable, "-W", "error::UserWarning:kfac_sua", "-m", "kfac_sua.train", *TINY, *arguments],
        cwd=cwd,
        env=environment | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def call(*arguments: str, cwd: Path) -> tuple[int, str, str]:
    """Run the command and return its exit code, stdout and stderr."""
    process = start(*arguments, cwd=cwd)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def wait_for(name: str, root: Path) -> None:
    """Wait until a process has written a file of that name somewhere below ``root``."""
    deadline = time.monotonic() + 120
    while not list(root.rglob(name)):
        assert time.monotonic() < deadline, f"no {name} within two minutes"
        time.sleep(0.05)


def call_in_process(monkeypatch, cwd: Path, *arguments: str) -> int:
    """Run the command in this process, which saves the seconds that importing torch takes."""
    monkeypatch.chdir(cwd)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    monkeypatch.setattr(sys, "argv", ["train", *TINY, *arguments])
    return train.main()


def infos(root: Path) -> dict[str, dict]:
    """Return run.json of every run, by directory relative to outputs/runs."""
    runs = root / "outputs" / "runs"
    return {path.parent.relative_to(runs).as_posix(): json.loads(path.read_text()) for path in runs.rglob("run.json")}


def test_train_and_the_same_command_again(tmp_path, monkeypatch, capsys):
    """One command trains, sums the layers up in three lines, and repeats nothing when called again."""
    arguments = ("preconditioner=sua", "epochs=2")
    code, out, err = call(*arguments, cwd=tmp_path)
    assert (code, err) == (0, "")
    assert out.startswith("3 layers preconditioned (2 SUA, 1 K-FAC)\ninverses 0.07 MiB, refresh ")
    assert out.splitlines()[2] == "plain gradient: 2 x normalisation layer (verbose=true shows each layer)"
    assert out.splitlines()[3].startswith("started on cpu: ")
    assert out.count("\nepoch ") == 2
    (name,) = infos(tmp_path)
    assert f"outputs/runs/{name}" in out
    assert name.startswith("digits-tiny-sua/lr=0.03,damping=0.1-")
    assert [path.name for path in tmp_path.iterdir()] == ["outputs"]
    code = call_in_process(monkeypatch, tmp_path, *arguments)
    out, err = capsys.readouterr()
    assert (code, err, out.count("\n")) == (0, "", 1)
    assert out.startswith("already finished: epoch 2, val error ")


BAD = [
    (
        ("preconditioner.dampng=0.1",),
        "There is no key 'preconditioner.dampng' (did you mean 'preconditioner.damping'?)",
    ),
    (("preconditioner=grouped", "preconditioner.group_size=0"), "preconditioner.group_size must be >= 1 or null"),
    (("dataset=cifar10", "dataset.download=false"), "data/cifar10.npz does not exist; run `make data`"),
]


@pytest.mark.parametrize(("arguments", "sentence"), one_in(3, BAD))
def test_bad_input_in_a_real_process(tmp_path, arguments, sentence):
    """A misspelt key, a value out of range and a missing data set end in one line on stderr and exit code 2."""
    code, out, err = call(*arguments, cwd=tmp_path)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(sentence)
    assert list(tmp_path.iterdir()) == []


def test_multirun_gives_every_cell_a_directory_and_repeats_none(tmp_path, monkeypatch, capsys):
    """Two preconditioners times two learning rates are four runs; again, they are four lines and no run."""
    arguments = ("-m", "preconditioner=sua,grouped", "optimizer.lr=0.1,0.03", "epochs=1")
    assert call_in_process(monkeypatch, tmp_path, *arguments) == 0
    runs = infos(tmp_path)
    assert len(runs) == 4
    assert {info["status"] for info in runs.values()} == {"finished"}
    assert {name.split("-")[2].split("/")[0] for name in runs} == {"sua", "grouped"}
    assert [path.name for path in tmp_path.iterdir()] == ["outputs"]
    first = capsys.readouterr().out
    assert all(f"#{number} of 4 started on cpu: " in first for number in (1, 2, 3, 4))
    assert "\n4 runs: 4 finished.\n" in first
    assert first.splitlines()[-2].endswith("-m kfac_sua.runs.collect outputs/runs")
    assert first.splitlines()[-1].endswith("--logdir outputs/runs")
    assert call_in_process(monkeypatch, tmp_path, *arguments) == 0
    captured = capsys.readouterr()
    assert captured.out.count("already finished") == 4
    assert captured.out.count("#4 of 4 already finished") == 1
    assert "\nepoch " not in captured.out
    assert captured.err == ""
    assert infos(tmp_path) == runs


def test_diverging_cell_does_not_stop_a_sweep(tmp_path, monkeypatch, capsys):
    """The first of two learning rates diverges, which is recorded; the second finishes, and the exit code is 0."""
    code = call_in_process(monkeypatch, tmp_path, "-m", "preconditioner=sua", "optimizer.lr=1e6,0.03", "epochs=1")
    captured = capsys.readouterr()
    assert (code, captured.err) == (0, "")
    assert captured.out.count("diverged in epoch 1 (the loss is not finite)") == 1
    assert "\n2 runs: 1 finished, 1 diverged.\n" in captured.out
    assert sorted(info["status"] for info in infos(tmp_path).values()) == ["diverged", "finished"]


def test_failing_cell_does_not_stop_a_sweep_but_shows_in_its_exit_code(tmp_path, monkeypatch, capsys):
    """A data set that is missing fails one cell with a sentence; the other cell finishes, and the exit code is 1."""
    arguments = ("preconditioner=baseline", "dataset=cifar10,digits", "dataset.download=false", "epochs=1")
    code = call_in_process(monkeypatch, tmp_path, "-m", *arguments)
    captured = capsys.readouterr()
    assert code == 1
    assert captured.err.count("data/cifar10.npz does not exist") == 1
    assert "Some runs of the sweep failed" in captured.err
    assert "Traceback" not in captured.err
    assert "\n2 runs: 1 finished, 1 failed.\n" in captured.out
    assert [info["status"] for info in infos(tmp_path).values()] == ["finished"]


def test_the_summary_of_a_sweep_is_of_its_own_runs_and_silent_if_asked(tmp_path, monkeypatch, capsys):
    """Runs of before stay out of the table; a single run and progress=none have neither place nor table."""
    assert call_in_process(monkeypatch, tmp_path, "preconditioner=baseline", "epochs=1", "optimizer.lr=0.123") == 0
    alone = capsys.readouterr().out
    assert "#" not in alone
    assert " runs: " not in alone
    sweep = ("-m", "preconditioner=baseline", "epochs=1", "optimizer.lr=0.02,0.05")
    assert call_in_process(monkeypatch, tmp_path, *sweep) == 0
    _, header, *rows = capsys.readouterr().out.split("\n2 runs: 2 finished.\n")[1].splitlines()
    assert header.split()[0] == "lr"
    assert [row.split()[0] for row in rows[:-2]] == ["0.02", "0.05"]
    assert call_in_process(monkeypatch, tmp_path, *sweep, "progress=none") == 0
    silent = capsys.readouterr().out
    assert " of 2 " not in silent
    assert " runs: " not in silent


def test_progress_bar_goes_to_stderr(tmp_path, monkeypatch, capsys):
    """A bar replaces the line per epoch, and leaves stdout to the summary."""
    assert call_in_process(monkeypatch, tmp_path, "preconditioner=baseline", "epochs=2", "progress=bar") == 0
    captured = capsys.readouterr()
    assert "\nepoch " not in captured.out
    assert "8/8" in captured.err
    assert "epoch 2/2" in captured.err


@pytest.mark.slow
def test_sweep_from_a_grid_file_in_a_real_process(tmp_path):
    """sweep=lr runs all learning rates of its file without -m."""
    grid = {cell.optimizer.lr for cell in compose_cells(["sweep=lr"]).configs}
    code, out, err = call("sweep=lr", "preconditioner=baseline", "epochs=1", cwd=tmp_path)
    assert (code, err) == (0, "")
    assert {info["config"]["optimizer"]["lr"] for info in infos(tmp_path).values()} == grid
    assert f"#{len(grid)} of {len(grid)} started on cpu: " in out


@pytest.mark.slow
def test_sweep_over_three_axes_in_a_real_process(tmp_path):
    """-m with comma lists runs every combination, each in its own directory."""
    values = ("preconditioner=sua,grouped", "optimizer.lr=0.1,0.03", "preconditioner.damping=0.1,0.01")
    code, out, err = call("-m", *values, "epochs=1", cwd=tmp_path)
    assert (code, err) == (0, "")
    assert "#8 of 8 started on cpu: " in out
    assert len(infos(tmp_path)) == 8
    assert all(info["status"] in ("finished", "diverged") for info in infos(tmp_path).values())


@pytest.mark.slow
def test_two_processes_do_not_share_a_run(tmp_path):
    """While one process trains, the same command leaves with a sentence; the records hold every epoch once."""
    arguments = ("preconditioner=baseline", "epochs=200")
    first = start(*arguments, cwd=tmp_path)
    wait_for("run.json", tmp_path)
    (lock,) = tmp_path.rglob(".lock")
    sentence = rf"is being trained by process {first.pid}; wait for it or stop it"
    with pytest.raises(RunBusyError, match=sentence), exclusive(lock.parent):
        pytest.fail("the lock was free")
    first.communicate(timeout=120)
    assert first.returncode == 0
    (metrics,) = tmp_path.rglob("metrics.csv")
    assert [record.epoch for record in read_records(metrics)] == list(range(201))
    with exclusive(lock.parent):
        pass  # free again


def test_interrupt_and_resume_in_real_processes(tmp_path):
    """Ctrl-C ends a run with code 130 and a sentence; the same command goes on to the end."""
    arguments = ("preconditioner=sua", "epochs=40")
    process = start(*arguments, cwd=tmp_path)
    wait_for("checkpoint.state", tmp_path)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    stopping, interrupted = err.splitlines()
    assert stopping.startswith("stopping after this step; ")
    assert interrupted.startswith("interrupted; the same command resumes ")
    code, out, err = call(*arguments, cwd=tmp_path)
    assert (code, err) == (0, "")
    assert "resumed on cpu" in out
    (metrics,) = tmp_path.rglob("metrics.csv")
    assert [record.epoch for record in read_records(metrics)] == list(range(41))
