"""Streams that cannot encode, are closed, have lost their reader or are full: nothing of it stops a command."""

import io
import os
import subprocess
import sys

import pytest
from tiny_runs import TINY

from kfac_sua.streams import _ERRORS, guard_streams

# A command of three lines; what it prints needs more than ASCII, and more than one write.
COMMAND = r"""
from kfac_sua.startup import begin, run_command
begin()
import logging, os, sys
def main():
    for _ in range(3):
        print("3\xd73 \xb1 1 \u2013 \u2265 \xe9", flush=True)
    logging.warning("\u03c3\xb2")
    open("descriptor", "w").write(str(os.open("next file", os.O_CREAT)))
run_command(main)
"""


def shell(script, tmp_path, command=COMMAND, **environment):
    """Return what a shell says about a script, in which "$@" is the command."""
    arguments = ["sh", "-c", script, "sh", sys.executable, *(["-c", command] if isinstance(command, str) else command)]
    variables = os.environ | environment
    return subprocess.run(arguments, cwd=tmp_path, env=variables, capture_output=True, timeout=300, check=False)


@pytest.mark.parametrize(
    ("environment", "line"),
    [
        ({"PYTHONIOENCODING": "ascii"}, b"3x3 +- 1 - >= \\xe9"),
        ({"LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}, b"3x3 +- 1 - >= \\xe9"),
        ({"PYTHONIOENCODING": "latin-1"}, "3×3 ± 1 - >= é".encode("latin-1")),
        ({"PYTHONIOENCODING": "utf-8"}, "3×3 ± 1 – ≥ é".encode()),
    ],
)
def test_what_a_stream_cannot_encode_is_replaced(tmp_path, environment, line):
    """By what reads alike, or by its code; what it can encode stays."""
    result = shell('"$@"', tmp_path, **environment)
    assert result.returncode == 0
    assert result.stdout.splitlines() == [line] * 3
    assert b"Traceback" not in result.stderr
    assert b"Logging error" not in result.stderr


def test_the_name_of_a_file_in_no_encoding_is_printed_byte_by_byte(tmp_path):
    """As the shell would show it, on a UTF-8 stream too."""
    name = os.fsdecode(b"caf\xe9\xff")
    guard_streams()  # which tells Python what _ERRORS are
    (tmp_path / "out").write_text(name, encoding="utf-8", errors=_ERRORS)
    assert (tmp_path / "out").read_bytes() == b"caf\xe9\xff"


@pytest.mark.parametrize(
    "script", ['"$@" | true', '"$@" 2>&1 | true', '"$@" >&-', '"$@" >&- 2>&- <&-', '"$@" >/dev/full 2>&-']
)
def test_a_command_goes_on_without_a_reader(tmp_path, script):
    """It comes to its end, says nothing about it, and opens no file where a stream was."""
    result = shell(script, tmp_path)
    assert result.stderr.replace("σ²".encode(), b"") in (b"", b"WARNING:root:\n")
    assert int((tmp_path / "descriptor").read_text()) > 2


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_stdout_is_said_once_and_is_a_failure(tmp_path, unbuffered):
    """Of a command that has nothing but its output."""
    result = shell('"$@" >/dev/full', tmp_path, PYTHONUNBUFFERED=unbuffered)
    assert result.returncode == 1
    assert result.stderr.count(b"Cannot write to standard output: No space left on device.") == 1
    assert b"Traceback" not in result.stderr
    assert (tmp_path / "descriptor").exists()


@pytest.mark.slow
def test_a_run_ends_as_it_would_when_its_output_is_lost(tmp_path):
    """Its records count."""
    command = ["-m", "kfac_sua.train", *TINY[:-1], "preconditioner=sua", "epochs=1", "output_dir=runs"]
    result = shell('"$@" >/dev/full', tmp_path, command, OMP_NUM_THREADS="1")
    assert result.returncode == 0, result.stderr
    (info,) = (tmp_path / "runs").rglob("run.json")
    assert '"status": "finished"' in info.read_text()


def test_a_stream_that_someone_has_put_there_is_left_alone(monkeypatch):
    """Such as a notebook's, or that of a test."""
    own = io.StringIO()
    monkeypatch.setattr(sys, "stdout", own)
    guard_streams()
    assert sys.stdout is own
