"""What somebody has planted in a shared directory: links are never written through, and pipes never waited for."""

import contextlib
import os
import socket
from pathlib import Path

import pytest
from synthetic_runs import epoch_record
from tiny_runs import directory_of, tiny_config

from kfac_sua.bench.record import read_record
from kfac_sua.cli.sweep import refuse_links
from kfac_sua.config import ConfigError
from kfac_sua.data.turn import turn
from kfac_sua.files.atomic import write_atomically
from kfac_sua.files.lock import exclusive
from kfac_sua.files.openers import own_file, read_regular
from kfac_sua.runs.metrics import append_record, read_records
from kfac_sua.runs.run_info import RecordError, read_run_info
from kfac_sua.runs.tensorboard import StepLog
from kfac_sua.training.loop import run

PRECIOUS = "somebody else's"


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """Return a file that must not change."""
    path = tmp_path / "precious"
    path.write_text(PRECIOUS)
    return path


def plant(link: Path, target: Path) -> None:
    """Put a link in the place of a file."""
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(target)


@pytest.mark.parametrize("name", ["file", "file.tmp"])
def test_a_file_replaces_a_link(tmp_path, target, name):
    """In the place of the file or of its temporary one."""
    plant(tmp_path / name, target)
    write_atomically(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new"
    assert not (tmp_path / "file").is_symlink()
    assert target.read_text() == PRECIOUS
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "precious"]


WRITTEN_IN_PLACE = {
    ".lock": lambda path: contextlib.ExitStack().enter_context(exclusive(path.parent)),
    "metrics.csv": lambda path: append_record(path, epoch_record(1)),
    "own turn": lambda path: contextlib.ExitStack().enter_context(turn(path, lambda: None)),
}


@pytest.mark.parametrize("place", ["empty", "missing"])
@pytest.mark.parametrize("name", WRITTEN_IN_PLACE)
def test_what_is_written_in_place_refuses_a_link_by_name(tmp_path, name, place):
    """Neither is the target written to, nor made if it is missing."""
    link = tmp_path / "shared" / name
    (tmp_path / "empty").touch()
    plant(link, tmp_path / place)
    with pytest.raises(OSError, match=rf"it is a symbolic link, which is not followed; remove it.*{name}"):
        WRITTEN_IN_PLACE[name](link)
    assert (tmp_path / "empty").read_bytes() == b""
    assert not (tmp_path / "missing").exists()
    assert link.is_symlink()


@pytest.mark.parametrize("place", ["directory", "missing"])
def test_losses_of_steps_are_not_written_into_a_directory_by_a_link(tmp_path, place):
    """The run's own directory may be one, that below it may not."""
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to("run")
    (tmp_path / "directory").mkdir()
    plant(tmp_path / "run/steps", tmp_path / place)
    with pytest.raises(OSError, match=r"it is a symbolic link, which is not followed; remove it.*steps"):
        StepLog(tmp_path / "link", 0.0, 0, 0.0)
    assert not list((tmp_path / "directory").iterdir())
    (tmp_path / "run/steps").unlink()
    StepLog(tmp_path / "link", 0.0, 0, 0.0).close()
    assert len(list((tmp_path / "run/steps").iterdir())) == 1


def test_rows_are_not_appended_through_a_link(tmp_path):
    """Not even to a metrics.csv."""
    append_record(tmp_path / "another's.csv", epoch_record(1))
    before = (tmp_path / "another's.csv").read_bytes()
    plant(tmp_path / "metrics.csv", tmp_path / "another's.csv")
    with pytest.raises(OSError, match=r"symbolic link, which is not followed; remove it.*metrics\.csv"):
        append_record(tmp_path / "metrics.csv", epoch_record(2))
    assert (tmp_path / "another's.csv").read_bytes() == before


def test_a_run_writes_through_no_link_but_that_of_its_output_directory(tmp_path, target):
    """All of its files, and the temporary ones, are links when it begins."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "runs").symlink_to("elsewhere")
    config = tiny_config(tmp_path / "runs", "preconditioner=baseline", "epochs=1")
    directory = directory_of(config)
    names = ["config.yaml", "run.json", "metrics.csv", "checkpoint.state", "best.pt", "last.pt"]
    for name in ["config.yaml", *(f"{name}.tmp" for name in names)]:
        plant(directory.path / name, target)
    assert run(config).status == "finished"
    assert target.read_text() == PRECIOUS
    assert [name for name in names if (directory.path / name).is_symlink()] == []
    assert directory.config.read_text().startswith("seed: 0")
    assert read_run_info(directory.info).status == "finished"


@pytest.mark.parametrize("name", [".sweep", ".sweep/multirun.yaml"])
def test_a_sweep_refuses_a_link_where_hydra_would_write(tmp_path, target, name):
    """Hydra follows it."""
    config = tiny_config(tmp_path / "runs")
    refuse_links([config])
    plant(tmp_path / "runs" / name, tmp_path if name == ".sweep" else target)
    with pytest.raises(ConfigError, match=rf"{name} is a symbolic link, .*; remove it\."):
        refuse_links([config])


def make_socket(path: Path) -> None:
    """Leave a socket's file."""
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(path))


SPECIAL = {
    "a named pipe": os.mkfifo,
    "a socket": make_socket,
    "a directory": Path.mkdir,
    "a device": lambda path: path.symlink_to("/dev/zero"),
}


@pytest.mark.parametrize("kind", SPECIAL)
def test_what_is_no_regular_file_is_refused_at_once(tmp_path, kind):
    """Neither waited for, as a pipe without a writer, nor read without end, as a device."""
    path = tmp_path / "x"
    SPECIAL[kind](path)
    for read in (read_run_info, read_records, read_record):
        with pytest.raises(RecordError, match=f"Cannot read {path}: .*{'' if kind == 'a directory' else kind}"):
            read(path)
    with pytest.raises(OSError, match=r"regular file|directory|symbolic link"):
        os.close(own_file(str(path), os.O_RDWR))


def test_a_regular_file_is_read_through_a_link(tmp_path, target):
    """Reading harms nothing, and people put large files elsewhere."""
    (tmp_path / "link").symlink_to(target)
    assert read_regular(tmp_path / "link") == PRECIOUS.encode()
