"""Bad input: an exit code, one sentence on stderr that names key, value and cure, and nothing on disk."""

import importlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from bad_inputs import (
    BAD_ARCHIVES,
    BAD_CHECKPOINTS,
    BAD_COMMANDS,
    BAD_ENVIRONMENTS,
    BAD_OTHER_COMMANDS,
    BAD_OUTPUT_DIRS,
    BAD_RECORDS,
    MARK,
)
from thinned import one_in

from kfac_sua import train
from kfac_sua.compose import compose_config
from kfac_sua.config import ConfigError
from kfac_sua.data import DataError
from kfac_sua.runs.run_info import RecordError
from kfac_sua.training import loop
from kfac_sua.training.checkpoint import CheckpointError

TINY = ["model=tiny", "dataset=digits", "device=cpu", "epochs=1"]
RESUMABLE = [
    "model=tiny",
    "dataset=digits",
    "device=cpu",
    "preconditioner=baseline",
    "dataset.train_size=100",
    "epochs=2",
]
BASELINE = ["preconditioner=baseline", "dataset.train_size=100", "dataset.train_eval_size=100"]


@pytest.fixture(autouse=True)
def own_directory(tmp_path, monkeypatch):
    """Run in a directory of its own, without debugging."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)


def call_main(monkeypatch, *arguments: str) -> int:
    """Return the exit code of ``python -m kfac_sua.train`` with these arguments."""
    monkeypatch.setattr(sys, "argv", ["train", *arguments])
    try:
        return train.main()
    except SystemExit as stop:
        return int(str(stop.code))


def assert_one_sentence(captured, sentence: str) -> None:
    """What was said is one line, without a traceback, and says what it must."""
    assert re.search(sentence, captured.err), captured.err
    assert captured.err.count("\n") == 1, captured.err
    assert captured.err.endswith((".\n", ".)\n"))


def test_there_are_as_many_cases_as_promised():
    """The tables hold at least sixty ways to be wrong."""
    tables = (BAD_COMMANDS, BAD_ARCHIVES, BAD_CHECKPOINTS, BAD_ENVIRONMENTS, BAD_OUTPUT_DIRS, BAD_OTHER_COMMANDS)
    assert sum(map(len, (*tables, *BAD_RECORDS.values()))) >= 60


@pytest.mark.parametrize("command", one_in(3, BAD_COMMANDS))
def test_bad_input_is_one_sentence(command, tmp_path, monkeypatch, capsys):
    """The exit code is 2, the sentence says what it must, there is no traceback, and nothing is written."""
    arguments = command.split()
    given = {argument.partition("=")[0] for argument in arguments if "." not in argument.partition("=")[0]}
    tiny = [argument for argument in TINY if argument.partition("=")[0] not in given]
    assert call_main(monkeypatch, *arguments, *tiny) == 2
    captured = capsys.readouterr()
    assert_one_sentence(captured, BAD_COMMANDS[command])
    assert captured.out == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("argument", ["\n", "seed=\n1", "model='a\nb'", "optimizer.lr='a\nb'", "output_dir=${a\nb}"])
def test_line_breaks_in_an_argument_do_not_break_the_sentence(argument, monkeypatch, capsys):
    """What is quoted of the command line stays on the line of the sentence."""
    assert call_main(monkeypatch, argument) == 2
    assert_one_sentence(capsys.readouterr(), r"\.$")


@pytest.mark.parametrize("case", one_in(4, BAD_ARCHIVES))
def test_bad_archive_is_one_sentence(case, tmp_path, monkeypatch, capsys):
    """A data file that cannot be used is named with its cure, runs no code, and leaves no run behind."""
    path = tmp_path / "cifar10.npz"
    BAD_ARCHIVES[case].write(path)
    arguments = ["model=tiny", "device=cpu", "epochs=1", "dataset=cifar10", "dataset.data_dir=."]
    assert call_main(monkeypatch, *arguments) == 2
    assert_one_sentence(capsys.readouterr(), BAD_ARCHIVES[case].sentence)
    assert [file.name for file in tmp_path.iterdir()] == ["cifar10.npz"]


@pytest.fixture(scope="module")
def interrupted_run(tmp_path_factory) -> Path:
    """Train one of two epochs, and return the working directory of the run."""
    folder = tmp_path_factory.mktemp("interrupted")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
        train_epoch = loop.train_epoch

        def stop_in_second_epoch(training, *rest):
            if training.epoch == 1:
                raise KeyboardInterrupt
            return train_epoch(training, *rest)

        monkeypatch.setattr(loop, "train_epoch", stop_in_second_epoch)
        assert call_main(monkeypatch, *RESUMABLE) == 130
    return folder


@pytest.fixture
def run_directory(interrupted_run, tmp_path) -> Path:
    """Copy the interrupted run into the working directory and return the run's own."""
    shutil.copytree(interrupted_run / "outputs", tmp_path / "outputs")
    (info,) = tmp_path.rglob("run.json")
    return info.parent


def test_interrupted_run_goes_on_where_nothing_is_damaged(run_directory, monkeypatch, capsys):
    """The run that the next tests damage is one that resumes."""
    assert call_main(monkeypatch, *RESUMABLE) == 0
    assert "resumed on cpu" in capsys.readouterr().out
    assert run_directory.is_dir()


@pytest.mark.parametrize("case", one_in(3, BAD_CHECKPOINTS))
def test_bad_checkpoint_is_one_sentence(case, run_directory, monkeypatch, capsys):
    """Without a sound checkpoint the run fails (1) with a sentence; no code in the file runs."""
    for path in run_directory.glob("checkpoint.previous*"):
        path.unlink()
    BAD_CHECKPOINTS[case].write(run_directory / "checkpoint.state")
    assert call_main(monkeypatch, *RESUMABLE) == 1
    assert_one_sentence(capsys.readouterr(), BAD_CHECKPOINTS[case].sentence)
    assert not (run_directory / MARK).exists()


@pytest.mark.parametrize(
    ("name", "case"), one_in(3, [(name, case) for name, cases in BAD_RECORDS.items() for case in cases])
)
def test_bad_record_is_one_sentence(name, case, run_directory, monkeypatch, capsys):
    """A damaged record is named, and the run fails (1) instead of starting over."""
    before = (run_directory / "checkpoint.state").read_bytes()
    BAD_RECORDS[name][case].write(run_directory / name)
    assert call_main(monkeypatch, *RESUMABLE) == 1
    assert_one_sentence(capsys.readouterr(), BAD_RECORDS[name][case].sentence)
    assert (run_directory / "checkpoint.state").read_bytes() == before


@pytest.mark.parametrize("setting", BAD_ENVIRONMENTS)
def test_bad_environment_is_one_sentence(setting, tmp_path, monkeypatch, capsys):
    """A variable that libraries would pass over is refused before anything is written."""
    monkeypatch.setenv(*setting.split("="))
    assert call_main(monkeypatch, *TINY) == 2
    assert_one_sentence(capsys.readouterr(), BAD_ENVIRONMENTS[setting])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("output_dir", one_in(2, BAD_OUTPUT_DIRS))
def test_bad_output_directory_is_one_sentence(output_dir, tmp_path, monkeypatch, capsys):
    """A directory that cannot be made is a failure (1), named in one sentence."""
    (tmp_path / "occupied").write_text("a file")
    assert call_main(monkeypatch, *TINY, *BASELINE, f"output_dir={output_dir}") == 1
    assert_one_sentence(capsys.readouterr(), BAD_OUTPUT_DIRS[output_dir])


@pytest.mark.parametrize("command", BAD_OTHER_COMMANDS)
def test_other_commands_refuse_bad_input(command, tmp_path, monkeypatch, capsys):
    """What is not right ends with code 2 and a sentence, after the usage where it is an option; no traceback."""
    (tmp_path / "occupied").write_text("a file")
    (tmp_path / "garbage").write_bytes(bytes(range(256)))
    for folder, name in (("garbage_runs", "run.json"), ("garbage_scaling", "scaling.csv")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_bytes(b"\x00\xff no records")
    module, *arguments = command.split()
    module += ".__main__" if module.startswith("kfac_sua.bench") else ""
    try:
        code = importlib.import_module(module).main(arguments)
    except SystemExit as stop:  # argparse's code
        code = stop.code
    err = capsys.readouterr().err
    assert code == 2
    assert re.search(BAD_OTHER_COMMANDS[command], err), err
    assert len([line for line in err.splitlines() if not line.startswith(("usage:", " "))]) == 1, err


def test_missing_cuda_device_is_named(tmp_path, monkeypatch, capsys):
    """device=cuda on a machine without one is refused before anything is written."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert call_main(monkeypatch, "model=tiny", "dataset=digits", "device=cuda") == 2
    assert_one_sentence(capsys.readouterr(), "device=cuda, but PyTorch finds no usable CUDA device")
    assert list(tmp_path.iterdir()) == []


def test_missing_muon_is_named_with_the_version(monkeypatch):
    """Where PyTorch has no Muon, the sentence says which PyTorch that is."""
    monkeypatch.delattr("torch.optim.Muon")
    with pytest.raises(ConfigError, match=r"needs torch.optim.Muon, which PyTorch \d+\.\d+.* lacks; install torch>="):
        compose_config(["optimizer=muon", "preconditioner=baseline"])


def test_failed_factorisation_is_one_sentence(monkeypatch, capsys):
    """A RuntimeError of PyTorch or the preconditioner keeps its message and says how to see where."""

    def fail(config, launch, invocation):
        raise RuntimeError("Factors of layer 'x'\nare not positive definite; raise the damping.")

    monkeypatch.setattr(train, "run", fail)
    assert call_main(monkeypatch, *TINY) == 1
    assert capsys.readouterr().err == (
        "Factors of layer 'x' are not positive definite; raise the damping. (--debug shows where.)\n"
    )


def test_bug_keeps_its_traceback(monkeypatch):
    """What no user can cause is not passed off as Hydra's fault."""

    def fail(config, launch, invocation):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(train, "run", fail)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        call_main(monkeypatch, *TINY)


ERRORS = [
    (["optimizer.lrr=1"], ConfigError, "no key 'optimizer.lrr'"),
    (["epochs=0"], ConfigError, "epochs must be ≥ 1"),
    (["optimizer=adamw"], ConfigError, "cannot be combined"),
    (["--lr"], ConfigError, "no flag '--lr'"),
    (["batch_size=5000"], DataError, "batch_size must be between 1 and 1300"),
    (["dataset=cifar10", "dataset.download=false"], DataError, "does not exist"),
    (["output_dir=/dev/null"], OSError, "Not a directory"),
    (["--resolve"], ValueError, "--resolve"),
]


@pytest.mark.parametrize(
    ("arguments", "error", "message", "is_flag"),
    one_in(3, [(*case, is_flag) for case in ERRORS for is_flag in (True, False)]),
)
def test_debugging_shows_the_traceback(is_flag, arguments, error, message, monkeypatch):
    """With --debug, anywhere, or HYDRA_FULL_ERROR=1, the exception comes through as it is."""
    given = {argument.partition("=")[0] for argument in arguments}
    tiny = [argument for argument in TINY if argument.partition("=")[0] not in given]
    if not is_flag:
        monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(error, match=message):
        call_main(monkeypatch, *arguments, *(["--debug"] if is_flag else []), *tiny)


def test_debugging_shows_the_traceback_of_damaged_files(run_directory, monkeypatch):
    """The same for a checkpoint and a record."""
    (run_directory / "checkpoint.state").write_bytes(b"")
    with pytest.raises(CheckpointError, match="is damaged"):
        call_main(monkeypatch, "--debug", *RESUMABLE)
    (run_directory / "run.json").write_text("")
    with pytest.raises(RecordError, match="not valid JSON"):
        call_main(monkeypatch, "--debug", *RESUMABLE)


def test_debugging_does_not_change_a_run_that_goes_well(monkeypatch, capsys):
    """--debug is no setting of the run, and is not handed on."""
    assert call_main(monkeypatch, "--debug", *TINY, *BASELINE) == 0
    assert call_main(monkeypatch, *TINY, *BASELINE) == 0
    assert "already finished" in capsys.readouterr().out


@pytest.mark.slow
def test_traceback_is_printed_in_a_real_process(tmp_path):
    """--debug ends in Python's own traceback, and without it there is none."""
    command = [sys.executable, "-m", "kfac_sua.train", "optimizer.lrr=1"]
    plain, debug = (
        subprocess.run([*command, *more], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120)
        for more in ([], ["--debug"])
    )
    assert "Traceback" not in plain.stderr
    assert "Traceback (most recent call last)" in debug.stderr
    assert "no key 'optimizer.lrr'" in debug.stderr
    assert list(tmp_path.iterdir()) == []


def test_exact_fisher_on_many_classes_can_be_asked_for():
    """The refusal of a hundred backward passes has the switch that it names."""
    overrides = ["dataset=cifar100", "preconditioner.fisher_type=exact", "preconditioner.allow_exact_fisher=true"]
    assert compose_config(overrides).preconditioner.fisher_type == "exact"
