"""Collected tables against numbers computed by hand."""

import math
import re
import subprocess
import sys

import pandas as pd
import pytest
from runs.synthetic_runs import epoch_record, run_info, write_run

from kfac_sua.compose import compose_config
from kfac_sua.config import Precision
from kfac_sua.device import choose_precision
from kfac_sua.methods import METHODS
from kfac_sua.runs.collect import collect_runs, main
from kfac_sua.runs.directory import resolved
from kfac_sua.runs.final_table import CollectError, final_table, require_one_precision, require_runs, select_best
from kfac_sua.runs.metrics import COLUMNS
from kfac_sua.runs.summary import format_table


def _epochs(*val_errors: float) -> list:
    """Return records with these validation errors."""
    return [epoch_record(epoch, val_error=error) for epoch, error in enumerate(val_errors, start=1)]


def test_one_row_per_epoch_with_the_settings_of_its_run(tmp_path):
    """The table holds every epoch of every run, beside what the run was."""
    write_run(tmp_path, _epochs(0.5, 0.25), "sua", seed=1, lr=0.3)
    write_run(tmp_path, _epochs(0.75), "baseline", status="running")
    frame = collect_runs(tmp_path)
    assert set(COLUMNS) < set(frame.columns)
    sua = frame[frame["preconditioner"] == "sua"].iloc[1]
    assert sua["run"] == "digits-tiny-sua/lr=0.3/seed=1"
    assert (sua["model"], sua["dataset"], sua["status"]) == ("tiny", "digits", "finished")
    assert (sua["base_lr"], sua["damping"], sua["seed"], sua["test_error"]) == (0.3, 0.01, 1, 0.25)
    assert (sua["epoch"], sua["step"], sua["lr"], sua["val_error"]) == (2, 100, 0.1, 0.25)
    baseline = frame[frame["preconditioner"] == "baseline"]
    assert len(baseline) == 1
    assert baseline[["damping", "test_error"]].isna().all(axis=None)


def test_run_without_an_epoch_is_not_lost(tmp_path):
    """A run that diverged in its first epoch has one row, so that it can be counted."""
    write_run(tmp_path, [], status="diverged", diverged_at_epoch=1)
    frame = collect_runs(tmp_path)
    assert frame[["epoch", "status"]].to_numpy().tolist() == [[0, "diverged"]]
    assert math.isnan(frame["val_error"][0])


@pytest.mark.parametrize(
    ("device", "added", "precision"),
    [
        ("cpu", {}, "float32"),
        ("cpu", {"precision": "float32"}, "float32"),
        ("cpu", {"precision": "bfloat16"}, "bfloat16"),
        ("cpu", {"precision": "float32", "capture": "auto"}, "float32"),
        ("cuda", {}, "float32 (convolutions in TF32)"),
        ("cuda", {"precision": "float32"}, "float32 (convolutions in TF32)"),
        ("cuda", {"precision": "bfloat16"}, "bfloat16 (of the network alone)"),
        ("cuda", {"precision": "float32", "capture": "auto"}, "float32"),
        ("cuda", {"precision": "tf32", "capture": False}, "tf32"),
        ("cuda", {"precision": "bfloat16", "capture": True}, "bfloat16"),
    ],
)
def test_runs_say_in_what_they_computed(tmp_path, device, added, precision):
    """On CUDA a run of before the key held for convolutions and products alike is of a kind of its own."""
    write_run(tmp_path, _epochs(0.5), device=device, config=run_info().config | added)
    assert collect_runs(tmp_path)["precision"].tolist() == [precision]


def test_new_runs_have_the_key_by_which_older_ones_are_told(tmp_path):
    """What run.json holds of a run that starts today says in what it computes, and has ``capture``."""
    config = compose_config(["model=tiny", "dataset=digits"])
    for device in ("cpu", "cuda"):
        info = run_info(config=resolved(config, device), device=device)
        assert info.precision == choose_precision(Precision.auto, device)


def _two_precisions(root) -> None:
    """Write two runs on CUDA of one precision, one of another, and one of before."""
    new = {"capture": "auto"}
    for name, lr, added in [
        ("kfac", 0.1, {"precision": "float32"}),
        ("sua", 0.1, new | {"precision": "tf32"}),
        ("sua", 0.3, new | {"precision": "tf32"}),
        ("sua", 1.0, new | {"precision": "float32"}),
    ]:
        config = run_info(name, lr=lr).config | added
        write_run(root, _epochs(0.5, 0.5 * lr), name, lr=lr, device="cuda", config=config)


def test_seconds_are_compared_within_one_precision(tmp_path):
    """The error names every precision with its methods, and what to do; a table that lacks it is of one, unknown."""
    _two_precisions(tmp_path)
    frame = collect_runs(tmp_path)
    found = r"\(float32: sua; float32 \(convolutions in TF32\): kfac; tf32: sua\)"
    cure = r"give the runs of one of these, or train all with the same, such as precision=float32\."
    with pytest.raises(CollectError, match=rf"^Seconds of runs in 3 precisions cannot be compared {found}; {cure}$"):
        require_one_precision(frame)
    require_one_precision(frame[frame["precision"] == "tf32"])
    require_one_precision(frame.iloc[:0])
    old = frame.drop(columns="precision")
    require_one_precision(old)
    with pytest.raises(CollectError, match=r"\(not recorded: kfac, sua; tf32: sua\)"):
        require_one_precision(pd.concat([old, frame[frame["precision"] == "tf32"]]))


def test_a_setting_is_not_chosen_by_seconds_of_several_precisions(tmp_path, capsys):
    """Errors and losses choose among all runs; seconds do not. The table then says which is of which precision."""
    _two_precisions(tmp_path)
    assert main([str(tmp_path), "--best-by", "seconds_per_epoch", "--csv", str(tmp_path / "epochs.csv")]) == 2
    assert "Seconds of runs in 3 precisions cannot be compared" in capsys.readouterr().err
    assert not (tmp_path / "epochs.csv").exists()
    main([str(tmp_path), "--best-by", "best_val_error"])
    tables = capsys.readouterr().out.split("\n\n")
    assert [("(convolutions in TF32), " in table, " tf32, " in table) for table in tables] == [
        (True, False),
        (False, True),
    ]
    assert [table.splitlines()[-1].split()[0] for table in tables] == ["kfac", "sua"]
    main([str(tmp_path / "digits-tiny-kfac"), "--best-by", "seconds_per_epoch"])
    assert "\n\n" not in capsys.readouterr().out


def test_empty_root_is_an_error(tmp_path):
    """A wrong directory is named instead of giving an empty table."""
    with pytest.raises(CollectError, match=f"No run below {tmp_path}"):
        collect_runs(tmp_path)


def test_metrics_without_run_info_are_an_error(tmp_path):
    """A directory that lost its run.json is named instead of being left out."""
    directory = write_run(tmp_path, _epochs(0.5), seed=0)
    write_run(tmp_path, _epochs(0.5), seed=1)
    (directory / "run.json").unlink()
    with pytest.raises(CollectError, match=r"seed=0 has metrics\.csv but no run\.json"):
        collect_runs(tmp_path)


def test_copy_of_a_run_is_an_error(tmp_path):
    """A run that is there twice would count twice in every mean."""
    write_run(tmp_path / "a", _epochs(0.5))
    write_run(tmp_path / "b", _epochs(0.5))
    with pytest.raises(CollectError, match=r"a/.* and b/.* are the same run"):
        collect_runs(tmp_path)


@pytest.mark.parametrize("epochs", [[1, 2, 2], [2, 1]])
def test_repeated_or_unordered_epochs_are_an_error(tmp_path, epochs):
    """Rows that a faulty resume has written twice are reported."""
    write_run(tmp_path, [epoch_record(epoch) for epoch in epochs])
    with pytest.raises(CollectError, match="does not hold each epoch once, in order"):
        collect_runs(tmp_path)


def test_finished_run_without_an_epoch_is_an_error(tmp_path):
    """A finished run whose metrics are gone is reported."""
    write_run(tmp_path, [])
    with pytest.raises(CollectError, match="marked as finished but has no epoch"):
        collect_runs(tmp_path)


@pytest.mark.parametrize("config", [{}, {"preconditioner": {"name": "sua"}}, {"preconditioner": None}])
def test_config_without_the_needed_keys_is_an_error(tmp_path, config):
    """A run.json of another program's making is named."""
    write_run(tmp_path, _epochs(0.5), config=config)
    with pytest.raises(CollectError, match=r"The config in .*run\.json lacks"):
        collect_runs(tmp_path)


def test_require_runs_names_what_is_missing(tmp_path):
    """Every preconditioner without a run that has ended is named, running ones with that remark."""
    write_run(tmp_path, _epochs(0.5), "baseline")
    write_run(tmp_path, _epochs(0.5), "sua", status="diverged")
    write_run(tmp_path, _epochs(0.5), "kfac", status="running")
    frame = collect_runs(tmp_path)
    require_runs(frame, ["baseline", "sua"])
    with pytest.raises(CollectError, match=r"Of 4 .* 2 have no finished run: kfac, grouped \(kfac still"):
        require_runs(frame, ["baseline", "sua", "kfac", "grouped"])


def test_failed_runs_have_not_ended(tmp_path):
    """Neither needed nor chosen nor averaged, but counted and named: the same command tries them again."""
    write_run(tmp_path, _epochs(0.5), "sua", seed=0)
    write_run(tmp_path, _epochs(0.1), "sua", seed=1, status="failed", failure="Out of memory.")
    write_run(tmp_path, _epochs(0.1), "sua", lr=0.3, status="failed", failure="Out of memory.")
    write_run(tmp_path, _epochs(0.5), "kfac", status="failed", failure="Out of memory.")
    write_run(tmp_path, _epochs(0.5), "grouped", status="running")
    frame = collect_runs(tmp_path)
    with pytest.raises(CollectError, match=r"kfac, grouped \(grouped still marked as running; kfac failed\); start"):
        require_runs(frame, ["sua", "kfac", "grouped"])
    row = final_table(frame).set_index(["preconditioner", "base_lr"]).loc[("sua", 0.1)]
    assert (row["finished"], row["failed"], row["best_val_error_mean"]) == (1, 1, 0.5)
    assert "1 +1 failed" in format_table(final_table(frame))
    assert set(select_best(frame)["fingerprint"]) == {"sua-0.1"}


def test_final_table_has_mean_and_deviation_over_finished_seeds(tmp_path):
    """Best and last errors, test errors and seconds per epoch equal those computed by hand."""
    write_run(tmp_path, _epochs(0.50, 0.20, 0.30), seed=0, test_error=0.25)
    write_run(tmp_path, _epochs(0.60, 0.50, 0.40), seed=1, test_error=0.35)
    write_run(tmp_path, _epochs(0.9), seed=2, status="diverged")
    write_run(tmp_path, _epochs(0.9), seed=3, status="running")
    table = final_table(collect_runs(tmp_path))
    assert len(table) == 1
    row = table.iloc[0]
    assert (row["finished"], row["diverged"], row["running"]) == (2, 1, 1)
    expected = {
        "epochs_mean": 3.0,
        "train_loss_mean": 2.0 / 3,
        "train_eval_loss_mean": 0.5,
        "best_val_error_mean": (0.20 + 0.40) / 2,
        "final_val_error_mean": (0.30 + 0.40) / 2,
        "final_val_error_std": 0.10 / math.sqrt(2),  # sample deviation of two values
        "test_error_mean": 0.30,
        "test_error_std": 0.10 / math.sqrt(2),
        "seconds_per_epoch_mean": 10.0,
        "seconds_per_epoch_std": 0.0,
    }
    assert row[list(expected)].to_dict() == pytest.approx(expected, rel=1e-12)


def test_final_table_keeps_the_baseline_and_one_row_per_setting(tmp_path):
    """The baseline's missing damping does not drop it, and learning rates are not mixed."""
    write_run(tmp_path, _epochs(0.5), "baseline")
    for lr in (0.1, 0.3):
        write_run(tmp_path, _epochs(0.5), "kfac", lr=lr)
    table = final_table(collect_runs(tmp_path))
    assert table[["preconditioner", "base_lr"]].to_numpy().tolist() == [
        ["baseline", 0.1],
        ["kfac", 0.1],
        ["kfac", 0.3],
    ]
    assert table["best_val_error_std"].isna().all()


def test_best_setting_is_the_lowest_mean_validation_error_without_divergence(tmp_path):
    """A setting is chosen by its mean over seeds, and one with a diverged seed only if there is no other."""
    write_run(tmp_path, _epochs(0.10), seed=0, lr=0.1)
    write_run(tmp_path, _epochs(0.50), seed=1, lr=0.1)
    write_run(tmp_path, _epochs(0.20), seed=0, lr=0.3)
    write_run(tmp_path, _epochs(0.20), seed=1, lr=0.3)
    write_run(tmp_path, _epochs(0.05), seed=0, lr=1.0)
    write_run(tmp_path, _epochs(0.05), seed=1, lr=1.0, status="diverged")
    write_run(tmp_path, _epochs(0.01), seed=0, lr=3.0, status="running")
    write_run(tmp_path, _epochs(0.9), "kfac", lr=1.0, status="diverged")
    best = select_best(collect_runs(tmp_path))
    chosen = best[["preconditioner", "base_lr", "seed"]].drop_duplicates().to_numpy().tolist()
    assert sorted(chosen) == [["kfac", 1.0, 0], ["sua", 0.3, 0], ["sua", 0.3, 1]]


def test_methods_stand_in_the_order_of_the_figures(tmp_path):
    """Tables list the methods as the legends of the figures do, not by alphabet."""
    for name in ("sua_grouped", "grouped", "baseline", "sua", "kfac"):
        write_run(tmp_path, _epochs(0.5), name)
    table = final_table(collect_runs(tmp_path))
    assert table["preconditioner"].tolist() == [name for name in METHODS if name in set(table["preconditioner"])]


def test_command_line_keeps_the_best_setting_by_a_named_quantity(tmp_path, capsys):
    """--best-by prints one setting per method, by the quantity asked for."""
    write_run(tmp_path, [epoch_record(1, train_loss=0.5, val_error=0.1)], lr=0.1)
    write_run(tmp_path, [epoch_record(1, train_loss=0.4, val_error=0.2)], lr=0.3)
    for quantity, lr in (("train_loss", "0.3"), ("best_val_error", "0.1")):
        main([str(tmp_path), "--best-by", quantity])
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 3
        assert f", lr {lr}, " in lines[0]


def test_command_line_prints_the_table_and_writes_all_epochs(tmp_path, capsys):
    """The command prints one row per setting and writes one row per epoch."""
    write_run(tmp_path / "runs", _epochs(0.5, 0.25))
    main([str(tmp_path / "runs"), "--csv", str(tmp_path / "epochs.csv")])
    assert "sua" in capsys.readouterr().out
    assert pd.read_csv(tmp_path / "epochs.csv")["val_error"].tolist() == [0.5, 0.25]


def test_command_line_fails_with_one_sentence(tmp_path, capsys):
    """Damage ends the command with a message instead of a traceback, and the exit code of bad input."""

    def refused(*arguments: str) -> str:
        assert main([str(tmp_path), *arguments]) == 2
        return capsys.readouterr().err

    assert "No run below" in refused()
    directory = write_run(tmp_path, _epochs(0.5))
    assert re.search(r"Cannot write .*epochs\.csv", refused("--csv", str(tmp_path / "missing" / "epochs.csv")))
    (directory / "metrics.csv").write_text("foreign")
    assert "line 1" in refused()


def test_records_cost_no_import_of_plotting_or_tensorboard():
    """Training pays for TensorBoard only when it logs, and never for matplotlib or torchvision."""
    code = (
        "import sys, kfac_sua.runs.metrics, kfac_sua.runs.run_info, kfac_sua.runs.tensorboard, kfac_sua.runs.collect;"
        "print(sorted({'matplotlib', 'tensorboard', 'torchvision'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
