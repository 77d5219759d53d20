"""One process per directory, whoever comes first, and no lock outlives its process."""

import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_runs import lock_holder

from kfac_sua.files import lock as lock_module
from kfac_sua.files.lock import RunBusyError, exclusive

# Waits for a line, so that two of them set off together.
TAKE = """
import sys, time
from pathlib import Path
from kfac_sua.files.lock import RunBusyError, exclusive
print("ready", flush=True)
sys.stdin.readline()
try:
    with exclusive(Path(sys.argv[1])):
        print("held", flush=True)
        sys.stdin.readline()
except RunBusyError as error:
    print(error, flush=True)
"""


def start(directory: Path) -> subprocess.Popen[str]:
    """Start a process that takes the lock when told to, and wait until it is ready."""
    command = [sys.executable, "-c", TAKE, str(directory)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert line_of(process) == "ready"
    return process


def line_of(process: subprocess.Popen[str]) -> str:
    """Return the next line that it prints."""
    assert process.stdout is not None
    return process.stdout.readline().strip()


def tell(process: subprocess.Popen[str]) -> None:
    """Send it the line that it waits for."""
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def end(process: subprocess.Popen[str]) -> None:
    """Kill it, and close its pipes."""
    with process:
        process.kill()


def test_of_two_that_start_together_one_holds_it(tmp_path):
    """Ten times over: never both and never none, and the second is told what to do."""
    for attempt in range(10):
        directory = tmp_path / str(attempt)
        pair = [start(directory), start(directory)]
        for process in pair:
            tell(process)
        lines = sorted((line_of(process) for process in pair), reverse=True)
        for process in pair:
            end(process)
        assert lines[0] == "held"
        assert "is being trained by " in lines[1]
        assert lines[1].endswith("; wait for it or stop it.")


def test_lock_of_a_killed_process_is_free(tmp_path):
    """The file stays and names a process that is no more, which blocks no one."""
    process = start(tmp_path)
    tell(process)
    assert line_of(process) == "held"
    with pytest.raises(RunBusyError, match=rf"is being trained by process {process.pid}; "), exclusive(tmp_path):
        pass
    process.send_signal(signal.SIGKILL)
    end(process)
    assert lock_holder(tmp_path / ".lock") == process.pid
    with exclusive(tmp_path):
        assert lock_holder(tmp_path / ".lock") == os.getpid()


def test_a_new_directory_at_the_same_path_has_a_lock_of_its_own(tmp_path):
    """Who holds a directory that someone has removed does not keep others from starting anew."""
    directory = tmp_path / "run"
    with exclusive(directory):
        shutil.rmtree(directory)
        with exclusive(directory):
            assert (directory / ".lock").exists()


def test_a_directory_removed_before_the_lock_is_taken_is_made_again(tmp_path, monkeypatch):
    """Between opening and locking the file another process may remove it: a lock on nothing would let both in."""
    directory, real_lock = tmp_path / "run", lock_module._lock
    removed = []

    def remove_first(file, path):
        if not removed:
            removed.append(path)
            shutil.rmtree(directory)
        real_lock(file, path)

    monkeypatch.setattr(lock_module, "_lock", remove_first)
    with exclusive(directory), pytest.raises(RunBusyError), exclusive(directory):
        pass
    assert removed == [directory / ".lock"]


def test_a_directory_that_cannot_be_made_is_named(tmp_path):
    """A file in its place is an error that says where."""
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="file") as caught, exclusive(tmp_path / "file" / "run"):
        pass
    assert str(caught.value.filename).startswith(str(tmp_path / "file"))


def test_a_holder_on_another_machine_is_named_with_it(tmp_path, monkeypatch):
    """The number of a process says nothing without its host, where many hosts share a directory."""
    with monkeypatch.context() as context:
        context.setattr(lock_module.socket, "gethostname", lambda: "node7")
        holding = exclusive(tmp_path)
        holding.__enter__()
    sentence = rf"is being trained by process {os.getpid()} on node7; wait for it or stop it\."
    with pytest.raises(RunBusyError, match=sentence), exclusive(tmp_path):
        pass
    holding.__exit__(None, None, None)


def test_a_file_system_without_locks_is_an_error_that_names_the_file(tmp_path, monkeypatch):
    """Without locks two hosts could mix their records; some network file systems have none."""

    def flock(file, operation):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(lock_module.fcntl, "flock", flock)
    with pytest.raises(OSError, match="Function not implemented") as caught, exclusive(tmp_path):
        pass
    assert caught.value.filename == str(tmp_path / ".lock")
