"""What a run trained can be used: weights as plain state dicts, ``load_run``, the evaluation command, training on."""

import dataclasses
import shutil
import signal
from pathlib import Path

import pytest
import torch
from tiny_runs import directory_of, metrics_without_times, tiny_config

import kfac_sua
from kfac_sua import load
from kfac_sua.build import build_splits
from kfac_sua.compose import quoted
from kfac_sua.config import Config, ConfigError, Precision
from kfac_sua.evaluate import evaluate_run, main
from kfac_sua.runs.run_info import RecordError, read_run_info, write_run_info
from kfac_sua.training import files
from kfac_sua.training.build import build_training
from kfac_sua.training.loop import run
from kfac_sua.training.signals import Interrupted
from kfac_sua.training.state import Training
from kfac_sua.training.writer import RunWriter

SETTINGS = ("preconditioner=kfac", "preconditioner.inverse_period=3")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of three epochs: its configuration and its directory."""
    root = tmp_path_factory.mktemp("finished")
    config = tiny_config(root, *SETTINGS, "epochs=3")
    run(config)
    return config, directory_of(config)


def test_weights_are_plain_state_dicts_of_the_best_and_the_last_epoch(finished):
    """``torch.load`` reads both, and the last give the test error of run.json to the bit."""
    config, directory = finished
    for name in ("best", "last"):
        state = torch.load(directory.path / f"{name}.pt", weights_only=True)
        assert state.keys() == kfac_sua.load_run(directory.path, name).network.state_dict().keys()
    loaded = kfac_sua.load_run(directory.path, "last")
    assert loaded.epoch == 3
    assert not loaded.network.training
    assert loaded.config == dataclasses.replace(config, precision=Precision.float32)
    assert [row.epoch for row in loaded.records] == [0, 1, 2, 3]
    result = evaluate_run(loaded)
    info = read_run_info(directory.info)
    assert (result.loss, result.error) == (info.test_loss, info.test_error)


def test_the_best_weights_have_the_lowest_validation_error_of_any_epoch(finished):
    """Evaluated again, on the held-out images, they give just that row."""
    _, directory = finished
    best = kfac_sua.load_run(directory.path)
    lowest = min(best.records[1:], key=lambda row: row.val_error)
    assert best.epoch == lowest.epoch
    result = evaluate_run(best, "val")
    assert (result.loss, result.error) == (lowest.val_loss, lowest.val_error)


def test_the_first_of_equal_epochs_is_kept_with_a_copy_of_its_weights():
    """Later steps do not change what was kept."""
    training = build_training(tiny_config(Path("unused"), *SETTINGS), torch.device("cpu"))
    training.epoch = 1
    training.keep_if_best(0.5)
    kept = {name: value.clone() for name, value in training.best["model"].items()}
    with torch.no_grad():
        for parameter in training.model.parameters():
            parameter.add_(1.0)
    training.epoch = 2
    training.keep_if_best(0.5)
    assert training.best["epoch"] == 1
    assert all(torch.equal(kept[name], value) for name, value in training.best["model"].items())
    training.keep_if_best(0.4)
    assert (training.best["epoch"], training.best["val_error"]) == (2, 0.4)


def test_weights_of_a_run_that_goes_on_come_from_its_checkpoint(tmp_path, monkeypatch):
    """Interrupted in its second epoch: last is the checkpoint's network, best the first epoch's."""
    config = tiny_config(tmp_path, *SETTINGS, "epochs=3")
    begin_epoch = Training.begin_epoch

    def stop(training: Training) -> None:
        begin_epoch(training)
        if training.epoch == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(Training, "begin_epoch", stop)
    with pytest.raises(Interrupted):
        run(config)
    directory = directory_of(config).path
    last = kfac_sua.load_run(directory, "last")
    assert (last.epoch, last.batch) == (1, 0)
    assert kfac_sua.load_run(directory).epoch == 1
    assert not (directory / "last.pt").exists()
    monkeypatch.undo()
    run(config)
    assert kfac_sua.load_run(directory, "last").epoch == 3


def test_weights_within_an_epoch_say_so(tmp_path, monkeypatch, capsys):
    """Two mini-batches into the second epoch."""
    config = tiny_config(tmp_path, *SETTINGS, "epochs=3")
    take_steps = iter([False] * 6 + [True] * 9)
    between = RunWriter.after_batch

    def stop(writer: RunWriter) -> None:
        if next(take_steps, False) and writer.training.batch == 2:
            writer._stop.signal_number = signal.SIGINT
        between(writer)

    monkeypatch.setattr(RunWriter, "after_batch", stop)
    with pytest.raises(Interrupted):
        run(config)
    last = kfac_sua.load_run(directory_of(config).path, "last")
    assert (last.epoch, last.batch) == (1, 2)
    capsys.readouterr()
    assert main([str(directory_of(config).path), "--weights", "last", "--device", "cpu"]) == 0
    assert capsys.readouterr().out.endswith("last weights, epoch 1 and 2 mini-batches of the next\n")


def test_best_weights_that_an_earlier_version_did_not_keep_are_not_made_up(tmp_path, monkeypatch):
    """A run whose best epoch was trained before there was ``best.pt`` has none, whatever came later."""
    config = tiny_config(tmp_path, *SETTINGS, "epochs=3")
    keep = Training.keep_if_best

    def keep_later(training: Training, val_error: float) -> None:
        if training.epoch > 1:
            keep(training, val_error)

    monkeypatch.setattr(Training, "keep_if_best", keep_later)
    monkeypatch.setattr(files, "best_epoch", lambda records: 1)
    monkeypatch.setattr(load, "best_epoch", lambda records: 1)
    run(config)
    with pytest.raises(RecordError, match=r"has no best weights \(it is finished, with 3 epochs in its records\)"):
        kfac_sua.load_run(directory_of(config).path)
    assert kfac_sua.load_run(directory_of(config).path, "last").epoch == 3


def test_loading_changes_nothing_in_the_directory(finished, tmp_path):
    """Not even the name of a checkpoint of before, or a damaged one: another version may be training there."""
    copy = tmp_path / "copy"
    shutil.copytree(finished[1].path, copy)
    (copy / "checkpoint.state").rename(copy / "checkpoint.pt")
    (copy / "last.pt").unlink()
    names = sorted(path.name for path in copy.iterdir())
    assert kfac_sua.load_run(copy, "last").epoch == 3
    shutil.copy(copy / "checkpoint.pt", copy / "checkpoint.previous.pt")
    (copy / "checkpoint.pt").write_bytes(b"damaged")
    assert kfac_sua.load_run(copy, "last").epoch == 3
    assert sorted(path.name for path in copy.iterdir() if "previous" not in path.name) == names


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda path: (path / "last.pt").write_bytes(b"no weights"), "last.pt is damaged"),
        (lambda path: torch.save({"a": torch.zeros(1)}, path / "last.pt"), "are not those of its network"),
        (lambda path: shutil.rmtree(path), "Cannot read .*run.json"),
        (lambda path: [(path / name).unlink() for name in ("last.pt", "checkpoint.state")], "has no last weights"),
    ],
)
def test_damaged_runs_are_refused_with_a_sentence(finished, tmp_path, capsys, damage, sentence):
    """By the function and by the command."""
    copy = tmp_path / "copy"
    shutil.copytree(finished[1].path, copy)
    damage(copy)
    with pytest.raises(RecordError, match=sentence):
        kfac_sua.load_run(copy, "last")
    assert main([str(copy), "--weights", "last"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_evaluation_command_prints_one_line(finished, capsys):
    """Of the split and the weights that are asked for."""
    _, directory = finished
    assert main([str(directory.path), "--weights", "last", "--device", "cpu"]) == 0
    info = read_run_info(directory.info)
    expected = f"test error {info.test_error:.2%}, loss {info.test_loss:.4f}: last weights, epoch 3\n"
    assert capsys.readouterr().out == expected


def test_the_documented_way_to_use_a_network(finished):
    """Images normalised with the run's own mean and deviation give the error of the evaluation."""
    config, directory = finished
    loaded, splits = kfac_sua.load_run(directory.path, "last"), build_splits(config.dataset)
    mean, std = splits.mean[:, None, None], splits.std[:, None, None]  # [3, 1, 1]
    images = (splits.test.images.float() / 255 - mean) / std  # [N, 3, 32, 32]
    with torch.no_grad():
        wrong = loaded.network(images).argmax(1) != splits.test.labels
    assert wrong.float().mean().item() == pytest.approx(read_run_info(directory.info).test_error, abs=0.01)


def trained_on(root: Path, source: Path, *more: str) -> Config:
    """Return the configuration of a tiny run that starts from another one."""
    return tiny_config(root, *SETTINGS, *more, f"start_from={quoted(str(source))}")


# --- training on ----------------------------------------------------------------------------------------------------


def test_a_run_trained_on_equals_one_of_as_many_epochs(finished, tmp_path):
    """Two more epochs after three: the rows are those of five, in a directory of its own that names its source."""
    _, source = finished
    config = trained_on(tmp_path, source.path, "epochs=5")
    info = run(config)
    assert info.config["start_from"] == str(source.path)
    assert directory_of(config).path != source.path
    whole = tiny_config(tmp_path / "whole", *SETTINGS, "epochs=5")
    run(whole)
    assert metrics_without_times(config) == metrics_without_times(whole)
    assert info.test_error == read_run_info(directory_of(whole).info).test_error
    log = directory_of(config).log.read_text()
    assert f"started on cpu from epoch 3 of {source.path}" in log


def test_a_run_trained_on_needs_its_source_no_more(finished, tmp_path):
    """Loaded, and trained on in turn, after the first one has gone."""
    first = tmp_path / "first"
    shutil.copytree(finished[1].path, first)
    second = trained_on(tmp_path, first, "epochs=4")
    run(second)
    path = directory_of(second).path
    shutil.rmtree(first)
    assert kfac_sua.load_run(path, "last").config.start_from == str(first)
    third = trained_on(tmp_path / "third", path, "epochs=5")
    assert run(third).status == "finished"
    with pytest.raises(ConfigError, match="start_from must be null or the directory of a run"):
        trained_on(tmp_path, first, "epochs=4")


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (("epochs=3",), "epochs=3 must be more than the 3 of start_from="),
        (("epochs=5", "optimizer.lr=0.2"), "other settings .optimizer.lr was 0.03 and is 0.2.; only epochs may differ"),
        (("epochs=5", "seed=1"), "other settings .seed was 0 and is 1.; only epochs may differ"),
    ],
)
def test_what_cannot_be_trained_on_is_refused(finished, tmp_path, more, sentence):
    """Before anything is written."""
    config = trained_on(tmp_path, finished[1].path, *more)
    with pytest.raises(ConfigError, match=sentence):
        run(config)


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (("schedule=cosine",), "schedule=cosine goes by the share of a run's epochs"),
        (("preconditioner.damping_final=0.01",), "preconditioner.damping_final is that of the last epoch"),
    ],
)
def test_schedules_over_a_runs_epochs_cannot_be_gone_on_with(tmp_path, more, sentence):
    """More epochs would have changed those that were trained."""
    source = tiny_config(tmp_path, *SETTINGS, *more, "epochs=2")
    run(source)
    with pytest.raises(ConfigError, match=sentence):
        run(trained_on(tmp_path, directory_of(source).path, *more, "epochs=4"))


def test_a_source_that_has_not_finished_is_refused(finished, tmp_path):
    """So is a directory that holds no run, by the check of the configuration."""
    copy = tmp_path / "copy"
    shutil.copytree(finished[1].path, copy)
    info = read_run_info(copy / "run.json")
    write_run_info(copy / "run.json", dataclasses.replace(info, status="running"))
    with pytest.raises(ConfigError, match=r"it is running\); start from one that has"):
        run(trained_on(tmp_path, copy, "epochs=5"))
    with pytest.raises(ConfigError, match="start_from must be null or the directory of a run"):
        tiny_config(tmp_path, f"start_from={tmp_path}")


def test_a_run_of_before_goes_on_from_its_checkpoint_of_the_old_name(finished, tmp_path):
    """``checkpoint.pt`` of an earlier version is renamed and gone on from."""
    config, directory = finished
    copy = dataclasses.replace(config, output_dir=str(tmp_path))
    path = directory_of(copy).path
    shutil.copytree(directory.path, path)
    info = read_run_info(path / "run.json")
    write_run_info(path / "run.json", dataclasses.replace(info, status="running", records_digest=None))
    (path / "checkpoint.state").rename(path / "checkpoint.pt")
    run(copy)
    assert read_run_info(path / "run.json").status == "finished"
    assert "resumed on cpu" in (path / "train.log").read_text()
    assert not (path / "checkpoint.pt").exists()
