"""train.log: what a run says, over all of its attempts, with the package's warnings and the command that started it."""

import logging
import os
import re
import shlex
from pathlib import Path

import pytest
from tiny_runs import tiny_config

from kfac_sua.command_line import keep_command, kept_command
from kfac_sua.runs.log import RunLog
from kfac_sua.runs.run_info import read_run_info
from kfac_sua.training.launch import Invocation
from kfac_sua.training.loop import run

TIME = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00"


def test_lines_carry_their_time_and_are_appended(tmp_path):
    """A text of several lines has one time; a second log of the same file goes on after the first."""
    path = tmp_path / "train.log"
    for text in ("a table\n  of µ rows", "again"):
        log = RunLog(path)
        log.add(text)
        log.close()
    first, second, third = path.read_text(encoding="utf-8").splitlines()
    assert re.fullmatch(f"{TIME}  a table", first)
    assert second == f"{'':25}    of µ rows"
    assert re.fullmatch(f"{TIME}  again", third)


def test_warnings_of_the_package_are_kept_while_it_is_open(tmp_path):
    """Those of its modules, with their level, and none once it is closed."""
    path, logger = tmp_path / "train.log", logging.getLogger("kfac_sua.preconditioner")
    log = RunLog(path)
    logger.warning("%d inverses failed", 3)
    log.close()
    logger.warning("later")
    assert re.fullmatch(f"{TIME}  warning: 3 inverses failed\n", path.read_text())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_said_with_the_name_of_the_file(tmp_path):
    """As of all files of a run."""
    log = RunLog(tmp_path / "train.log")
    try:
        with Path("/dev/full").open("r+b", buffering=0) as full:
            os.dup2(full.fileno(), log._file.fileno())
        with pytest.raises(OSError, match=r"No space left.*train\.log"):
            log.add("text")
    finally:
        log.close()


def test_a_name_that_is_no_text_is_kept_as_it_is(tmp_path):
    """Of a file or directory, as the system gives it."""
    path = tmp_path / "train.log"
    log = RunLog(path)
    log.add(os.fsdecode(b"caf\xe9\xff"))
    log.close()
    assert path.read_bytes().endswith(b"  caf\xe9\xff\n")


@pytest.mark.parametrize(
    ("argument", "kept"),
    [
        ("storage=postgresql://me:s3cret@host:5432/db", "storage=postgresql://me:***@host:5432/db"),
        ("storage=redis://:s3:cr@et@host", "storage=redis://:***@host"),
        ("storage=sqlite:///me:or@you.db", "storage=sqlite:///me:or@you.db"),
        ("storage=mysql://host:3306/db", "storage=mysql://host:3306/db"),
    ],
)
def test_the_password_of_an_address_is_not_kept(monkeypatch, argument, kept):
    """The command is in run.json and train.log, which others read."""
    monkeypatch.setenv("KFAC_SUA_COMMAND", "")
    keep_command("kfac_sua.train", [argument, "seed=1"])
    assert shlex.split(kept_command()) == ["python", "-m", "kfac_sua.train", kept, "seed=1"]


def test_a_run_keeps_its_command_its_layers_and_its_epochs(tmp_path, monkeypatch, capsys):
    """Command and overrides in run.json, all that was said in train.log; a run that has ended adds nothing."""
    monkeypatch.setenv("KFAC_SUA_COMMAND", "")
    keep_command("kfac_sua.train", ["-m", "seed=0,1", "output_dir=with space"])
    config = tiny_config(tmp_path, "epochs=2")
    run(config, invocation=Invocation(overrides=("seed=0", "epochs=2")))
    (path,) = tmp_path.rglob("run.json")
    info = read_run_info(path)
    assert info.command == os.environ["KFAC_SUA_COMMAND"]
    assert info.command == "python -m kfac_sua.train -m seed=0,1 'output_dir=with space'"
    assert info.overrides == ["seed=0", "epochs=2"]
    text = path.with_name("train.log").read_text(encoding="utf-8")
    said = [line[27:] for line in text.splitlines()]
    assert said[0].startswith("started on cpu, ")
    assert said[0].endswith(info.command)
    assert sum(line.startswith("epoch ") for line in said) == 3
    assert sum(line.startswith("classifier ") for line in said) == 2  # sizes, and how it is inverted and applied
    assert said[-1].startswith("finished: epoch 2, ")
    run(config)
    assert path.with_name("train.log").read_text(encoding="utf-8") == text
    assert "features.4" not in capsys.readouterr().out
