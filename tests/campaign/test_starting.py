"""Processes that are copied from one with everything imported: what they find, and that CUDA and threads survive it."""

import os
import signal
import subprocess
import sys
import threading
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from thinned import one_in

from kfac_sua.campaign.starting import METHOD, PRELOADED, start

copied = pytest.mark.skipif(METHOD != "forkserver", reason="processes are not copied on this system")

# Everything through which a module could use CUDA while it is imported raises.
WITHOUT_CUDA = """
import sys
import torch

def refuse(*arguments, **options):
    raise RuntimeError("CUDA is used")

for name in ("is_available", "device_count", "init", "_lazy_init"):
    setattr(torch.cuda, name, refuse)
torch._C._cuda_getDeviceCount = refuse
for name in sys.argv[1:]:
    __import__(name)
"""


def answer(function) -> object:
    """Return what a function returns in a process that has just been started, and wait for its end."""
    process, connection = start(function)
    value = connection.recv()
    process.join()
    assert process.exitcode == 0
    return value


def send_surroundings(connection: Connection) -> None:
    """Send what a process finds."""
    held = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    connection.send((dict(os.environ), Path.cwd(), sys.path, held, handlers))


def send_modules_and_threads(connection: Connection) -> None:
    """Send what a process has imported, whether CUDA has been used, and how many threads Python and the system see."""
    is_bad_fork = getattr(torch._C, "_cuda_isInBadFork", lambda: False)()
    num_tasks = len(list(Path("/proc/self/task").iterdir()))
    connection.send((set(sys.modules), torch.cuda.is_initialized() or is_bad_fork, threading.active_count(), num_tasks))


def test_a_process_finds_what_a_new_one_would(tmp_path, monkeypatch):
    """The environment and the directory of the moment, whatever they were when the first process was started."""
    monkeypatch.setenv("KFAC_SUA_TEST", "before")
    answer(send_surroundings)
    monkeypatch.delenv("KFAC_SUA_TEST")
    monkeypatch.setenv("KFAC_SUA_OTHER", "now")
    monkeypatch.chdir(tmp_path)
    environment, directory, path, held, handlers = answer(send_surroundings)
    assert environment == dict(os.environ)
    assert directory == tmp_path
    assert path == sys.path
    assert held == set()
    assert handlers == (signal.SIG_IGN, signal.SIG_DFL)


def test_a_variable_of_its_own_is_that_of_one_process_alone(monkeypatch):
    """Neither this process nor the next one sees the GPU of another."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,6")
    for entry in ("6", "5"):
        process, connection = start(send_surroundings, {"CUDA_VISIBLE_DEVICES": entry})
        assert connection.recv()[0] == dict(os.environ) | {"CUDA_VISIBLE_DEVICES": entry}
        process.join()
    assert answer(send_surroundings)[0]["CUDA_VISIBLE_DEVICES"] == "5,6"


@copied
def test_a_copy_has_the_imports_and_neither_cuda_nor_threads(tmp_path):
    """Beside the main thread there is only the one that waits for the parent; OpenBLAS has ended its own."""
    modules, has_used_cuda, num_threads, num_tasks = answer(send_modules_and_threads)
    assert set(PRELOADED) <= modules
    assert not has_used_cuda
    assert num_tasks == num_threads == 2


@pytest.mark.parametrize("uses_cuda", one_in(2, [False, True]))
def test_no_module_uses_cuda_when_it_is_imported(tmp_path, uses_cuda):
    """One that did would take CUDA from all processes that are copied from its own."""
    (tmp_path / "asks_for_cuda.py").write_text("import torch\ntorch.cuda.is_available()\n")
    names = ("asks_for_cuda",) if uses_cuda else PRELOADED
    command = [sys.executable, "-c", WITHOUT_CUDA, *names]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, sys.path)])}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ("CUDA is used" in result.stderr) == uses_cuda
    assert (result.returncode == 0) == (not uses_cuda), result.stderr
