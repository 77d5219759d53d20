"""A few cases of every campaign, and whether wrong results would be noticed."""

import csv
import dataclasses
import io
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_runs import TINY_PERIOD, directory_of, tiny_config

from kfac_sua.training.loop import run
from torture.outcome import Outcome, difference, read_outcome
from torture.soak import relative_growth
from torture.table import Result, as_csv, as_markdown

ROOT = Path(__file__).resolve().parents[2]
CASES = (
    "kills/SIGKILL-at-a-random-instant-0-sua_mc_ema",
    "kills/SIGKILL-before-a-file-operation-0-baseline",
    "kills/SIGTERM-0-grouped",
    "corruption/truncated-checkpoint.state-0",
    "corruption/a-hostile-torch.save-both-checkpoints-0",
    "faults/a-file-size-limit-0",
    "faults/two-processes-at-once-0",
    "faults/nan-skip-sua_grouped_mc_ema",
    "soak/descriptors",
    "soak/clock--86400",
)


def torture(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own: forks of this one would inherit the threads of other tests."""
    command = [sys.executable, "scripts/torture.py", "--out", str(out), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1200, check=False)


@pytest.mark.slow
def test_some_cases_of_every_campaign_are_survived(tmp_path):
    """Each kind of fault is tried at least once and survived, no result is wrong, and nothing but the table stays."""
    done = torture(tmp_path, "--minutes", "0.3", "--jobs", "2", "--only", *CASES)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = list(csv.DictReader(io.StringIO((tmp_path / "torture.csv").read_text())))
    assert [row["campaign"] for row in rows] == [name.partition("/")[0] for name in CASES] + ["all"]
    assert all(int(row["tried"]) == int(row["survived"]) > 0 and row["wrong results"] == "0" for row in rows)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["torture.csv", "torture.md"]


@pytest.mark.slow
def test_two_minute_cut_is_survived(tmp_path):
    """The short cut of the whole, as ``make torture MINUTES=2`` runs it."""
    done = torture(tmp_path, "--minutes", "2")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_unknown_case_is_one_sentence(tmp_path):
    """A misspelt name is refused before anything runs."""
    done = torture(tmp_path / "out", "--only", "kills/nonsense")
    assert (done.returncode, done.stdout) == (2, "")
    assert "there is no case 'kills/nonsense'" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def outcome(tmp_path_factory) -> Outcome:
    """Return what a small run leaves."""
    config = tiny_config(tmp_path_factory.mktemp("run"), "preconditioner=sua", TINY_PERIOD, "epochs=2")
    run(config)
    return read_outcome(directory_of(config))


def test_an_outcome_equals_itself(outcome):
    """Nothing is reported where nothing differs."""
    assert difference(outcome, outcome) == ""


def _with_state(outcome: Outcome, **changes: object) -> Outcome:
    return dataclasses.replace(outcome, state=dataclasses.replace(outcome.state, **changes))


def _nudged(tensors: dict) -> dict:
    """Change the last bit of one number."""
    nudged = tensors["classifier.bias"].clone()
    nudged[0] = nudged[0].nextafter(nudged.new_tensor(float("inf")))
    return {**tensors, "classifier.bias": nudged}


DEVIATIONS = {
    "parameter": lambda o: _with_state(o, model=_nudged(o.state.model)),
    "step": lambda o: _with_state(o, step=o.state.step + 1),
    "test error": lambda o: dataclasses.replace(o, info=dataclasses.replace(o.info, test_error=0.5)),
    "row lost": lambda o: dataclasses.replace(o, records=o.records[:-1]),
    "loss": lambda o: dataclasses.replace(o, records=[dataclasses.replace(r, val_loss=1.0) for r in o.records]),
    "seconds backwards": lambda o: dataclasses.replace(
        o, records=[dataclasses.replace(r, train_time_s=-r.epoch) for r in o.records]
    ),
    "duplicate point": lambda o: dataclasses.replace(
        o, points={tag: points + points[-1:] for tag, points in o.points.items()}
    ),
    "duplicate time": lambda o: dataclasses.replace(
        o, points={**o.points, "time/train": o.points["time/train"] + o.points["time/train"][-1:]}
    ),
}


@pytest.mark.parametrize("deviation", DEVIATIONS)
def test_every_deviation_is_noticed(outcome, deviation):
    """The comparison that all campaigns rest on sees one bit, one row and one point."""
    assert difference(DEVIATIONS[deviation](outcome), outcome) != ""


def test_growth_is_that_after_warm_up():
    """Memory that rises during the first fifth is flat; memory that rises for ever is not."""
    assert relative_growth([50.0] * 20 + [100.0] * 80) == 0
    assert relative_growth([100.0 + sample for sample in range(100)]) > 0.4


def test_table_adds_up_and_names_what_was_lost():
    """One row per kind of fault with the sum of its cases, and one for all."""
    results = [
        Result("kills", "SIGKILL", "kills/a", tried=3, survived=3, lost=(0, 1, 4)),
        Result("kills", "SIGKILL", "kills/b", tried=1, survived=0, wrong=1, lost=(9,), problem="wrong"),
        Result("soak", "memory", "soak/a"),
    ]
    assert list(csv.reader(io.StringIO(as_csv(results))))[1:] == [
        ["kills", "SIGKILL", "4", "3", "2.5", "9", "1"],
        ["soak", "memory", "1", "1", "–", "–", "0"],
        ["all", "", "5", "4", "2.5", "9", "1"],
    ]
    lines = as_markdown(results).splitlines()
    assert len(lines) == 5
    assert len({len(line) for line in lines}) == 1
