"""CIFAR by itself in real processes: a first start, several at once, and some that are interrupted or killed."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from cifar_mirror import Mirror, fake_cifar, serving, start, use_mirror

from kfac_sua.data import DataError, load_archive

TINY = (
    *("dataset=cifar10", "model=tiny", "device=cpu", "progress=none", "preconditioner=baseline", "epochs=1"),
    *("dataset.validation_size=100", "batch_size=50"),
)
DEADLINE_S = 120.0


@pytest.fixture
def mirror() -> Iterator[Mirror]:
    """Serve a small CIFAR-10."""
    with serving(fake_cifar()) as one:
        yield one


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Wait for a process, and return its exit code, stdout and stderr."""
    out, err = process.communicate(timeout=DEADLINE_S)
    return process.returncode, out, err


def stop(process: subprocess.Popen[str], mirror: Mirror, number: signal.Signals) -> tuple[int, str, str]:
    """Send a signal to a process in the middle of its download."""
    assert mirror.is_sending.wait(DEADLINE_S), process.communicate()
    process.send_signal(number)
    return ended(process)


def test_a_first_start_fetches_and_trains(tmp_path: Path, mirror: Mirror) -> None:
    """Nothing but the command is needed; one line says that it downloads."""
    code, out, err = ended(start(mirror, tmp_path, "train", *TINY))
    assert (code, err) == (0, "")
    assert out.startswith(f"downloading cifar10 into data from {mirror.url}\nstarted on cpu: ")
    assert "finished: epoch 1" in out
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["cifar10.npz"]


def test_of_two_commands_at_once_one_downloads(tmp_path: Path, mirror: Mirror) -> None:
    """The other one waits, says so, and finds the data set."""
    mirror.behaviour = "held"
    first = start(mirror, tmp_path, "data.download", "cifar10")
    assert mirror.is_sending.wait(DEADLINE_S)
    second = start(mirror, tmp_path, "data.download", "cifar10")
    assert second.stdout is not None
    assert second.stdout.readline() == "waiting for another process, which makes data/cifar10.npz\n"
    mirror.may_go_on.set()
    summary = "data/cifar10.npz: 300 training and 60 test images, 10 classes\n"
    assert ended(first) == (0, f"downloading cifar10 into data from {mirror.url}\n{summary}", "")
    assert ended(second) == (0, summary, "")
    assert mirror.downloads == 1
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["cifar10.npz"]


def test_interrupted_it_leaves_nothing_and_can_be_repeated(
    tmp_path: Path, mirror: Mirror, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C ends the command at once with code 130 and a sentence."""
    mirror.behaviour = "stalled"
    code, _, err = stop(start(mirror, tmp_path, "train", *TINY), mirror, signal.SIGINT)
    assert (code, err) == (130, "interrupted; the same command downloads cifar10 again.\n")
    assert not (tmp_path / "data").exists()
    mirror.behaviour = "whole"
    use_mirror(monkeypatch, mirror)
    assert len(load_archive("cifar10", tmp_path / "data", download=True)[0]) == 300


def test_killed_it_leaves_nothing_that_is_believed(
    tmp_path: Path, mirror: Mirror, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After SIGKILL there is no data set without a network; with one, it is fetched, and what was left is removed."""
    mirror.behaviour = "stalled"
    data_dir = tmp_path / "data"
    stop(start(mirror, tmp_path, "train", *TINY), mirror, signal.SIGKILL)
    assert sorted(path.name for path in data_dir.iterdir()) == [".cifar10.lock", ".cifar10.partial"]
    use_mirror(monkeypatch, mirror)
    with pytest.raises(DataError, match="does not exist"):
        load_archive("cifar10", data_dir)
    mirror.behaviour = "whole"
    assert len(load_archive("cifar10", data_dir, download=True)[0]) == 300
    assert [path.name for path in data_dir.iterdir()] == ["cifar10.npz"]
    assert mirror.downloads == 2


@pytest.mark.slow
def test_of_the_processes_of_a_run_one_downloads(tmp_path: Path, mirror: Mirror) -> None:
    """The other waits much longer than it waits for anything else."""
    mirror.behaviour, mirror.pause_s = "slow", 3.0
    code, out, err = ended(start(mirror, tmp_path, "train", *TINY, patience_s=20, processes=2))
    assert code == 0, err
    assert out.count("downloading cifar10") == mirror.downloads == 1
    assert "started on 2 processes, cpu" in out


@pytest.mark.slow
def test_of_the_processes_of_a_run_one_says_that_there_is_no_network(tmp_path: Path, mirror: Mirror) -> None:
    """One sentence, and no process is left waiting."""
    mirror.behaviour = "missing"
    code, _, err = ended(start(mirror, tmp_path, "train", *TINY, processes=2))
    assert code != 0
    assert err.count("cifar10 could not be downloaded into data (HTTPError: HTTP Error 404: Not Found)") == 1
    assert mirror.downloads == 0  # torchvision's question for redirections was answered so
    assert not (tmp_path / "data").exists()
