"""CIFAR by itself: what is fetched, from whom, what is refused, and that nothing half is left or believed."""

from __future__ import annotations

import errno
import fcntl
import io
import shutil
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cifar_mirror import DOWNLOAD, FOLDER, Mirror, fake_cifar, serving, use_mirror
from process_group import free_ports

from kfac_sua.data import DataError, archive, cifar, fetch_cifar, is_at_hand, load_archive

WRONG = r"the checksum of what came is wrong: it is incomplete or another file"
CURE = (
    r"; try again where there is a network, give dataset\.data_dir=DIR with a DIR that holds cifar10\.npz, "
    r"cifar-10-python\.tar\.gz or its folder cifar-10-batches-py, or use dataset=digits\.$"
)
# What the server does -> the reason that is said.
FAILURES = {
    "broken": WRONG,
    "truncated": WRONG,
    "page": WRONG,
    "stalled": r"the server was silent for 0\.3 s",
    "missing": r"HTTPError: HTTP Error 404: Not Found",
    "absent": r"URLError: <urlopen error \[Errno \d+\] Connection refused>",
}
FILES = list(fake_cifar().files)


@pytest.fixture
def mirror(monkeypatch: pytest.MonkeyPatch) -> Iterator[Mirror]:
    """Serve a small CIFAR-10, which torchvision takes for the real one; wait for the network 0.3 s at most."""
    monkeypatch.setattr(cifar, "NETWORK_TIMEOUT_S", 0.3)
    with serving(fake_cifar()) as one:
        use_mirror(monkeypatch, one)
        yield one


def names_in(folder: Path) -> list[str]:
    """Return what lies in a folder, hidden or not."""
    return sorted(path.name for path in folder.iterdir())


def assert_whole(data_dir: Path, mirror: Mirror) -> None:
    """The archive holds the images that the server has, in their order."""
    train, test, class_names = load_archive("cifar10", data_dir)
    assert (len(train), len(test), len(class_names)) == (300, 60, 10)
    batches = [np.load(io.BytesIO(mirror.cifar.files[name]), allow_pickle=True)["data"] for name in FILES[:5]]
    np.testing.assert_array_equal(train.images.numpy().reshape(300, 3072), np.concatenate(batches))


@pytest.mark.parametrize("behaviour", ["whole", "slow"])
def test_a_missing_data_set_is_downloaded_once(
    tmp_path: Path, mirror: Mirror, behaviour: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only the archive is left, which is read from then on; a server may take longer than it may be silent."""
    mirror.behaviour = behaviour
    data_dir = tmp_path / "new" / "data"
    load_archive("cifar10", data_dir, download=True)
    captured = capsys.readouterr()
    assert captured.out == f"downloading cifar10 into {data_dir} from {mirror.url}\n"
    assert captured.err == ""  # no bar in a log
    assert names_in(data_dir) == ["cifar10.npz"]
    assert_whole(data_dir, mirror)
    load_archive("cifar10", data_dir, download=True)
    assert mirror.downloads == 1
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("kind", ["folder", "download"])
def test_torchvisions_files_in_a_shared_folder_are_read_every_time(
    tmp_path: Path, mirror: Mirror, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nothing can be written, nothing is: no archive, no lock; damaged files are refused as everywhere."""
    monkeypatch.setattr(archive.os, "access", lambda path, mode: False)  # to root every folder can be written to
    if kind == "folder":
        mirror.cifar.extract(tmp_path)
    else:
        (tmp_path / DOWNLOAD).write_bytes(mirror.cifar.archive)
    before = names_in(tmp_path)
    for _ in range(2):
        assert_whole(tmp_path, mirror)
    assert is_at_hand("cifar10", tmp_path)
    assert names_in(tmp_path) == before
    assert mirror.downloads == 0
    damaged = tmp_path / before[0] / "data_batch_3" if kind == "folder" else tmp_path / before[0]
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"could not be read from"):
        load_archive("cifar10", tmp_path)


@pytest.mark.parametrize("behaviour", FAILURES)
def test_a_failed_download_is_one_sentence_and_leaves_nothing(
    tmp_path: Path, mirror: Mirror, behaviour: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sentence has the reason and the cure; the same call again, with a server that works, succeeds."""
    mirror.behaviour = behaviour
    data_dir = tmp_path / "new" / "data"
    with monkeypatch.context() as context:
        if behaviour == "absent":
            context.setattr("torchvision.datasets.CIFAR10.url", f"http://127.0.0.1:{free_ports(1)[0]}/{DOWNLOAD}")
        sentence = rf"^cifar10 could not be downloaded into {data_dir} \({FAILURES[behaviour]}\){CURE}"
        with pytest.raises(DataError, match=sentence):
            load_archive("cifar10", data_dir, download=True)
    assert names_in(tmp_path) == []
    mirror.behaviour = "whole"
    assert len(load_archive("cifar10", data_dir, download=True)[0]) == 300


def test_without_leave_to_download_the_server_is_not_asked(tmp_path: Path, mirror: Mirror) -> None:
    """The sentence is that of a missing archive, and nothing is made."""
    with pytest.raises(DataError, match=r"cifar10.npz does not exist; run `make data`"):
        load_archive("cifar10", tmp_path / "new")
    assert (mirror.downloads, names_in(tmp_path)) == (0, [])


@pytest.mark.parametrize("download", [False, True])
@pytest.mark.parametrize("has_part", [False, True], ids=["archive alone", "beside a part of its folder"])
def test_the_authors_archive_is_used_without_a_network(
    tmp_path: Path, mirror: Mirror, download: bool, has_part: bool
) -> None:
    """It is checked and left where it is; a folder that was extracted in part is passed over."""
    (tmp_path / DOWNLOAD).write_bytes(mirror.cifar.archive)
    if has_part:
        mirror.cifar.extract(tmp_path, without="batches.meta")
    before = names_in(tmp_path)
    load_archive("cifar10", tmp_path, download=download)
    assert_whole(tmp_path, mirror)
    assert mirror.downloads == 0
    assert names_in(tmp_path) == sorted([*before, "cifar10.npz"])
    assert (tmp_path / DOWNLOAD).read_bytes() == mirror.cifar.archive


def test_a_cut_archive_is_neither_believed_nor_touched(
    tmp_path: Path, mirror: Mirror, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a network it is named as the reason; with one, the download is made elsewhere."""
    (tmp_path / DOWNLOAD).write_bytes(mirror.cifar.archive[:-1])
    problem = rf"^cifar10 could not be read from {DOWNLOAD} in {tmp_path} \(RuntimeError: its checksum is wrong"
    with pytest.raises(DataError, match=problem):
        load_archive("cifar10", tmp_path)
    assert names_in(tmp_path) == [DOWNLOAD]
    load_archive("cifar10", tmp_path, download=True)
    assert_whole(tmp_path, mirror)
    assert mirror.downloads == 1
    assert (tmp_path / DOWNLOAD).read_bytes() == mirror.cifar.archive[:-1]
    assert f"could not be read from {DOWNLOAD} in {tmp_path}" in capsys.readouterr().out


@pytest.mark.parametrize("missing", FILES)
@pytest.mark.parametrize("is_cut", [False, True], ids=["missing", "cut"])
def test_a_folder_of_which_a_part_is_missing_is_not_believed(
    tmp_path: Path, mirror: Mirror, missing: str, is_cut: bool
) -> None:
    """Whichever file an extraction did not come to, or not through; torchvision itself never adds missing names."""
    mirror.cifar.extract(tmp_path, without=missing)
    if is_cut:
        (tmp_path / FOLDER / missing).write_bytes(mirror.cifar.files[missing][:-1])
    problem = rf"^cifar10 could not be read from {FOLDER} in {tmp_path} \(RuntimeError: Dataset "
    with pytest.raises(DataError, match=problem):
        load_archive("cifar10", tmp_path)
    assert names_in(tmp_path) == [FOLDER]
    load_archive("cifar10", tmp_path, download=True)
    assert_whole(tmp_path, mirror)


@pytest.mark.parametrize(
    ("leftover", "downloads"), [("nothing", 1), ("cut archive", 1), ("archive", 0), ("archive and part of folder", 0)]
)
def test_what_a_killed_process_leaves_is_used_or_removed(
    tmp_path: Path, mirror: Mirror, leftover: str, downloads: int
) -> None:
    """A whole download is not repeated, a cut one is; of what was extracted and written, nothing is taken over."""
    staging = tmp_path / ".cifar10.partial"
    staging.mkdir()
    (tmp_path / ".cifar10.lock").touch()
    (staging / "cifar10.npz").write_bytes(b"PK")
    if "archive" in leftover:
        (staging / DOWNLOAD).write_bytes(mirror.cifar.archive[: 5000 if leftover == "cut archive" else None])
    if "folder" in leftover:
        mirror.cifar.extract(staging, without="batches.meta")
    load_archive("cifar10", tmp_path, download=True)
    assert_whole(tmp_path, mirror)
    assert mirror.downloads == downloads
    assert names_in(tmp_path) == ["cifar10.npz"]


@pytest.mark.parametrize("place", ["folder", "download"])
def test_nothing_is_written_through_a_link_that_somebody_has_planted(
    tmp_path: Path, mirror: Mirror, place: str
) -> None:
    """Neither in the place of the hidden folder, nor inside of it; the data folder itself may be one."""
    (tmp_path / "real").mkdir()
    (tmp_path / "data").symlink_to("real")
    (tmp_path / "elsewhere").mkdir()
    staging = tmp_path / "data" / ".cifar10.partial"
    if place == "folder":
        staging.symlink_to(tmp_path / "elsewhere")
    else:
        staging.mkdir()
        (staging / DOWNLOAD).symlink_to(tmp_path / "elsewhere" / "file")
    load_archive("cifar10", tmp_path / "data", download=True)
    assert_whole(tmp_path / "data", mirror)
    assert names_in(tmp_path / "elsewhere") == []
    assert names_in(tmp_path / "real") == ["cifar10.npz"]


def test_a_link_that_leads_nowhere_is_not_replaced(tmp_path: Path, mirror: Mirror) -> None:
    """It may lead to a disk that is not mounted at the moment."""
    (tmp_path / "cifar10.npz").symlink_to("unmounted")
    with pytest.raises(DataError, match="does not exist"):
        load_archive("cifar10", tmp_path, download=True)
    assert (tmp_path / "cifar10.npz").is_symlink()
    assert mirror.downloads == 0


class Terminal(io.StringIO):
    """What a bar is drawn on."""

    def isatty(self) -> bool:
        """It is one."""
        return True


def test_a_terminal_sees_a_bar(tmp_path: Path, mirror: Mirror, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torchvision's own."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    fetch_cifar("cifar10", tmp_path)
    assert "100%" in terminal.getvalue()


def test_an_interrupted_download_says_so_and_leaves_nothing(
    tmp_path: Path, mirror: Mirror, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C has a sentence here, but that of whoever raises one of its own stays."""
    for given, said in (((), "interrupted; the same command downloads cifar10 again."), (("stopped.",), "stopped.")):

        def interrupt(*arguments: Any, given: tuple[str, ...] = given) -> None:
            raise KeyboardInterrupt(*given)

        monkeypatch.setattr(urllib.request, "urlopen", interrupt)
        with pytest.raises(KeyboardInterrupt) as caught:
            fetch_cifar("cifar10", tmp_path / "data")
        assert str(caught.value) == said
        assert names_in(tmp_path) == []


def test_a_file_system_without_locks_is_named(tmp_path: Path, mirror: Mirror, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes could not tell there which one downloads."""

    def refuse(*arguments: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(DataError, match=r"cifar10\.npz could not be written \(OSError: .*No locks available: .*\.lock"):
        fetch_cifar("cifar10", tmp_path)


def test_a_full_disk_ends_a_download_with_a_sentence(
    tmp_path: Path, mirror: Mirror, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is left that would keep the disk full."""

    def fail(*arguments: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("tarfile.TarFile.extractall", fail)
    with pytest.raises(DataError, match=r"could not be downloaded into .*No space left on device"):
        fetch_cifar("cifar10", tmp_path)
    assert names_in(tmp_path) == []


def test_a_data_set_that_appears_while_waiting_is_taken(
    tmp_path: Path, mirror: Mirror, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever held the lock made it: nothing is asked of the server, and no lock is left."""
    made = tmp_path / "made"
    fetch_cifar("cifar10", made)
    data_dir, flock = tmp_path / "data", fcntl.flock

    def busy_at_first(file: Any, how: int) -> None:
        if how & fcntl.LOCK_NB:
            raise BlockingIOError
        shutil.copyfile(made / "cifar10.npz", data_dir / "cifar10.npz")
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", busy_at_first)
    fetch_cifar("cifar10", data_dir)
    assert mirror.downloads == 1
    assert names_in(data_dir) == ["cifar10.npz"]
    assert capsys.readouterr().out.endswith(f"waiting for another process, which makes {data_dir / 'cifar10.npz'}\n")
