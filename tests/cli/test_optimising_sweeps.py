"""Sweepers that choose the next run by what the last ones came to: what a run tells them, and Optuna's own."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kfac_sua import train
from kfac_sua.cli.sweep import objective_value
from kfac_sua.config import Objective
from kfac_sua.runs.metrics import EpochRecord, read_records
from kfac_sua.runs.run_info import RunInfo, read_run_info

TINY = ("model=tiny", "dataset=digits", "device=cpu")
SHORT = (*TINY, "dataset.train_size=200", "epochs=1")


def record(epoch: int, loss: float, error: float) -> EpochRecord:
    """Return a row."""
    return EpochRecord(epoch, epoch, 0.1, loss + 0.2, error, loss + 0.1, loss, error, 1.0, *[0.0] * 5)


def info(status: str) -> RunInfo:
    """Return what run.json says of a run that has ended so."""
    return RunInfo(status, {}, "f", 0, None, {}, "cpu", "cpu", 1, "2026-01-01T00:00:00+00:00", test_error=0.01)


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        ("best_val_error", 0.2),
        ("final_val_error", 0.3),
        ("final_val_loss", 0.5),
        ("train_loss", 0.7),
        ("train_eval_loss", 0.6),
    ],
)
def test_the_objective_is_of_the_validation_or_the_training_set(objective, expected):
    """Lowest or last of the epochs that were trained, never the untrained network or the test set."""
    records = [record(0, 0.1, 0.1), record(1, 0.4, 0.2), record(2, 0.5, 0.3)]
    assert objective_value(Objective[objective], info("finished"), records) == pytest.approx(expected)
    assert objective_value(Objective[objective], info("diverged"), records[:1]) == math.inf


STAND_IN = """
from dataclasses import dataclass
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper

@dataclass
class Conf:
    _target_: str = "hydra_plugins.stand_in.StandIn"

ConfigStore.instance().store(group="hydra/sweeper", name="stand_in", node=Conf, provider="stand_in")

class StandIn(Sweeper):
    def setup(self, *, hydra_context, task_function, config):
        self.launcher = Plugins.instance().instantiate_launcher(
            config=config, hydra_context=hydra_context, task_function=task_function
        )

    def sweep(self, arguments):
        fixed = [argument for argument in arguments if "interval" not in argument]
        for number, lr in enumerate((1e6, 0.1)):
            (end,) = self.launcher.launch([(*fixed, f"optimizer.lr={lr}")], initial_job_idx=number)
            print("told", float(end.return_value), flush=True)
"""


@pytest.mark.slow
def test_a_sweeper_is_told_what_each_run_came_to(tmp_path):
    """Infinity of a run that diverges; numbers, table and best run are those that the sweeper chose."""
    plugin = tmp_path / "plugins/hydra_plugins"
    plugin.mkdir(parents=True)
    (plugin / "stand_in.py").write_text(STAND_IN)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(plugin.parent), *sys.path]), "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-m",
        "kfac_sua.train",
        "-m",
        "hydra/sweeper=stand_in",
        "objective=train_eval_loss",
        *SHORT,
    ]
    done = subprocess.run(
        [*command, "optimizer.lr=interval(0.01,1)"], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert (done.returncode, done.stderr) == (0, "")
    infos = {path: read_run_info(path) for path in tmp_path.rglob("run.json")}
    (finished,) = (path for path, info in infos.items() if info.status == "finished")
    loss = read_records(finished.with_name("metrics.csv"))[-1].train_eval_loss
    assert [line for line in done.stdout.splitlines() if line.startswith("told ")] == ["told inf", f"told {loss}"]
    assert "\n#2 started on cpu: " in done.stdout
    assert "\n2 runs: 1 finished, 1 diverged.\n" in done.stdout
    best = finished.parent.relative_to(tmp_path)
    assert f"\nLowest train_eval_loss, {loss:.4g}: " in done.stdout
    assert str(best) in done.stdout


# --- Optuna ---------------------------------------------------------------------------------------------------------


def test_two_trials_of_optuna(tmp_path, monkeypatch, capsys):
    """``sweep=optuna_lr_damping`` draws both keys on a log scale within their bounds; again, it repeats no run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train", "sweep=optuna_lr_damping", "hydra.sweeper.n_trials=2", *SHORT])
    assert train.main() == 0
    out = capsys.readouterr().out
    assert "\n#2 of 2 started on cpu: " in out
    configs = [json.loads(path.read_text())["config"] for path in tmp_path.rglob("run.json")]
    assert len(configs) == 2
    assert all(0.003 <= config["optimizer"]["lr"] <= 0.3 for config in configs)
    assert all(0.01 <= config["preconditioner"]["damping"] <= 10 for config in configs)
    monkeypatch.setattr(sys, "argv", ["train", "sweep=optuna_lr_damping", "hydra.sweeper.n_trials=2", *SHORT])
    assert train.main() == 0
    assert capsys.readouterr().out.count("already finished") == 2


EPOCHS = 6  # so that a signal in the first half of them comes within a run


def sweep(directory: Path) -> subprocess.Popen[str]:
    """Start eight trials."""
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "kfac_sua.train", "sweep=optuna_lr_damping", "hydra.sweeper.n_trials=8"),
            *(*TINY, "preconditioner=kfac", f"epochs={EPOCHS}"),
        ],
        cwd=directory,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def is_training(directory: Path) -> bool:
    """Whether a run is in the first half of its epochs, with a checkpoint."""
    return any(
        read_run_info(path).status == "running"
        and path.with_name("checkpoint.state").exists()
        and len(read_records(path.with_name("metrics.csv"))) <= EPOCHS // 2
        for path in directory.rglob("run.json")
    )


def chosen(directory: Path) -> dict[str, float]:
    """Return the lowest validation error of every run, by the directory that lr and damping are the name of."""
    return {
        path.parent.parent.name: min(row.val_error for row in read_records(path.with_name("metrics.csv"))[1:])
        for path in directory.rglob("run.json")
    }


@pytest.mark.slow
def test_eight_trials_interrupted_go_on_as_if_they_had_not_been(tmp_path):
    """Ctrl-C in the third run: the same command finishes it, and chooses the same values as a sweep left alone."""
    for name in ("interrupted", "alone"):
        (tmp_path / name).mkdir()
    first = sweep(tmp_path / "interrupted")
    deadline = time.monotonic() + 120
    while len(list((tmp_path / "interrupted").rglob("run.json"))) < 3 or not is_training(tmp_path / "interrupted"):
        assert first.poll() is None, first.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    first.send_signal(signal.SIGINT)
    _, err = first.communicate(timeout=60)
    assert first.returncode == 130, err
    assert "interrupted; the same command resumes from epoch" in err
    for name in ("interrupted", "alone"):
        out, err = sweep(tmp_path / name).communicate(timeout=300)
        assert ("resumed on cpu" in out) == (name == "interrupted")
        assert "\n8 runs: 8 finished.\n" in out, err
    assert chosen(tmp_path / "interrupted") == chosen(tmp_path / "alone")
    lowest = min(chosen(tmp_path / "alone").values())
    assert f"\nLowest best_val_error, {lowest:.4g}: " in out
