"""Archives on disk: what is read, what is refused and with which sentence, and how torchvision's copy is used."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import re
import socket
import subprocess
import sys
import urllib.error
import urllib.request
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kfac_sua.data import DataError, fetch_cifar, load_archive

Arrays = dict[str, Any]
FETCH = "run `make data` or `python -m kfac_sua.data.download` where there is a network"
CURE = f"; delete it and {FETCH}, put a whole cifar10.npz there, or use dataset=digits."


def load_error(path: Path, name: str = "cifar10") -> str:
    """Return the message with which loading the archive is refused."""
    with pytest.raises(DataError) as caught:
        load_archive(name, path.parent)
    return str(caught.value)


@pytest.fixture
def archive(tmp_path: Path, tiny_arrays: Arrays) -> Path:
    """Write a valid archive and return its path."""
    path = tmp_path / "cifar10.npz"
    np.savez(path, **tiny_arrays)
    return path


def test_images_labels_and_names_are_those_of_the_file(archive: Path, tiny_arrays: Arrays) -> None:
    """Pixels must keep their place while the channel axis moves to the front."""
    train, test, class_names = load_archive("cifar10", archive.parent)
    for split, images in (("train", train), ("test", test)):
        assert images.images.is_contiguous()
        for channel in range(3):
            expected = tiny_arrays[f"{split}_images"][..., channel]
            np.testing.assert_array_equal(images.images[:, channel].numpy(), expected)
        assert images.labels.tolist() == tiny_arrays[f"{split}_labels"].tolist()
        assert images.labels.dtype == torch.int64
    assert class_names == tiny_arrays["classes"].tolist()


@pytest.mark.parametrize("label_dtype", ["<i4", ">i8", "<u8"])
def test_any_integer_labels_and_compression_are_read(tmp_path: Path, tiny_arrays: Arrays, label_dtype: str) -> None:
    """Archives made by other tools, compressed and with other integer types, must load to the same labels."""
    tiny_arrays["train_labels"] = tiny_arrays["train_labels"].astype(label_dtype)
    np.savez_compressed(tmp_path / "cifar10.npz", **tiny_arrays)
    train, _, _ = load_archive("cifar10", tmp_path)
    assert train.labels.tolist() == tiny_arrays["train_labels"].tolist()


def test_archive_of_another_name_is_read_when_it_is_there(tmp_path: Path, tiny_arrays: Arrays) -> None:
    """A user's own archive needs no registration and may have any number of classes."""
    tiny_arrays["classes"] = np.array([f"class {label}" for label in range(12)])
    np.savez(tmp_path / "own.npz", **tiny_arrays)
    assert len(load_archive("own", tmp_path)[2]) == 12


@pytest.mark.parametrize(
    ("name", "also"),
    [
        ("cifar10", ", cifar-10-python.tar.gz or its folder cifar-10-batches-py"),
        ("cifar100", ", cifar-100-python.tar.gz or its folder cifar-100-python"),
        ("own", ""),
    ],
)
def test_missing_archive_names_the_file_and_the_cure(tmp_path: Path, name: str, also: str) -> None:
    """Without archive and without torchvision's folder there is one sentence and no attempt to download."""
    path = tmp_path / f"{name}.npz"
    assert load_error(path, name) == (
        f"{path} does not exist; {FETCH}, give dataset.data_dir=DIR with a DIR that holds {name}.npz{also}, "
        "or use dataset=digits."
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kept_fraction", [0.0, 0.3, 0.999])
def test_truncated_archive_is_refused(archive: Path, kept_fraction: float) -> None:
    """A file cut anywhere must be refused as a whole."""
    content = archive.read_bytes()
    archive.write_bytes(content[: int(kept_fraction * len(content))])
    assert load_error(archive) == (
        f"{archive} is not a readable .npz archive (truncated, not accessible, or a file of another kind){CURE}"
    )


@pytest.mark.parametrize("kind", ["text", "npy", "pickle", "folder"])
def test_file_of_another_kind_is_refused(tmp_path: Path, kind: str) -> None:
    """Text, a single array, a pickle or a folder under the archive's name is not an archive."""
    path = tmp_path / "cifar10.npz"
    if kind == "text":
        path.write_text("<html>404 Not Found</html>")
    elif kind == "npy":
        with path.open("wb") as file:
            np.save(file, np.zeros(3))
    elif kind == "pickle":
        path.write_bytes(pickle.dumps({"train_images": 1}))
    else:
        path.mkdir()
    assert load_error(path).startswith(f"{path} is not a readable .npz archive")


def test_corrupted_pixels_are_refused(archive: Path) -> None:
    """A single changed byte within the images must be noticed, by the zip file's checksum."""
    content = bytearray(archive.read_bytes())
    content[20_000] ^= 0xFF
    archive.write_bytes(content)
    assert load_error(archive) == (
        f"{archive} cannot be read at array 'train_images' (BadZipFile: Bad CRC-32 for file 'train_images.npy'){CURE}"
    )


def test_header_that_claims_impossible_memory_is_refused(archive: Path, tiny_arrays: Arrays) -> None:
    """A forged header must lead to the same kind of error, not to a MemoryError."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "|u1", "fortran_order": False, "shape": (1 << 50, 32, 32, 3)}
    )
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("train_images.npy", header.getvalue())
        for name in ("train_labels", "test_images", "test_labels", "classes"):
            file.writestr(f"{name}.npy", b"")
    assert f"{archive} cannot be read at array 'train_images' (" in load_error(archive)


def test_archive_larger_than_the_memory_is_refused_before_it_is_read(
    archive: Path, tiny_arrays: Arrays, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its headers tell what it takes; advice on the mini-batch would be of no use."""
    content = sum(array.nbytes for array in tiny_arrays.values())
    monkeypatch.setattr("kfac_sua.data.archive.device_memory", lambda device: 2 * content - 1)
    monkeypatch.setattr(np.lib.format, "read_array", None)
    num_images = len(tiny_arrays["train_images"]) + len(tiny_arrays["test_images"])
    needed, memory = f"{2 * content / 2**30:.1f}", f"{(2 * content - 1) / 2**30:.1f}"
    assert load_error(archive) == (
        f"{archive} needs {needed} GiB of memory for {num_images} images, where this machine has {memory} GiB and "
        f"CIFAR needs 0.4 GiB{CURE}"
    )


def test_archive_larger_than_the_free_memory_is_refused(archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit that no header can be held against."""

    def no_memory(*arguments: Any, **options: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(np.lib.format, "read_array", no_memory)
    assert re.search(
        r"needs 0\.0 GiB of memory for \d+ images, more than is free, .*; end other programs", load_error(archive)
    )


def test_wrong_shapes_are_refused_before_anything_is_read(
    archive: Path, tiny_arrays: Arrays, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However large they are."""
    np.savez(archive, **tiny_arrays | {"train_images": np.zeros((4, 64, 64, 3), np.uint8)})
    monkeypatch.setattr(np.lib.format, "read_array", None)
    assert load_error(archive).startswith(f"{archive} must hold train_images as uint8 [num_images, 32, 32, 3], got")


@pytest.mark.parametrize("place", ["cifar10.npz", "cifar-10-batches-py/data_batch_1", "cifar-10-python.tar.gz"])
@pytest.mark.parametrize("download", [False, True])
def test_a_named_pipe_is_not_waited_for(
    tmp_path: Path, place: str, download: bool, no_network: list[float | None]
) -> None:
    """In the place of any file that is read."""
    (tmp_path / place).parent.mkdir(exist_ok=True)
    os.mkfifo(tmp_path / place)
    with pytest.raises(DataError, match=r"named pipe|does not exist|could not be downloaded"):
        load_archive("cifar10", tmp_path, download=download)


def test_foreign_archive_is_refused_with_what_it_holds(tmp_path: Path) -> None:
    """An archive of something else is refused by naming what is missing and what was found."""
    path = tmp_path / "cifar10.npz"
    np.savez(path, train_images=np.zeros(3), weights=np.zeros(2))
    assert load_error(path) == (
        f"{path} has no array train_labels, test_images, test_labels, classes (it holds train_images, weights){CURE}"
    )


class MakesFolder:
    """An object whose unpickling creates a folder: the mark that code was run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


def test_pickled_objects_are_refused_and_never_run(tmp_path: Path, tiny_arrays: Arrays) -> None:
    """Reading an archive must not execute code in it, although this archive would with allow_pickle."""
    mark, path = tmp_path / "code was run", tmp_path / "cifar10.npz"
    tiny_arrays["train_labels"] = np.array([MakesFolder(mark)], dtype=object)
    np.savez(path, **tiny_arrays)
    assert load_error(path) == (
        f"{path} cannot be read at array 'train_labels' "
        f"(ValueError: Object arrays cannot be loaded when allow_pickle=False){CURE}"
    )
    assert not mark.exists()
    np.load(path, allow_pickle=True)["train_labels"]
    assert mark.exists(), "the payload of this test is dead, so it proves nothing"


def test_zip_member_that_is_no_array_is_refused(archive: Path) -> None:
    """NumPy returns such a member as bytes, which must not pass as an array."""
    with zipfile.ZipFile(archive, "w") as file:
        for name in ("train_images", "train_labels", "test_images", "test_labels", "classes"):
            file.writestr(f"{name}.npy", b"no array")
    assert load_error(archive).startswith(f"{archive} must hold classes as two or more strings, got something")


WRONG_ARRAYS = {
    "float images": ("train_images", np.zeros((40, 32, 32, 3), np.float32), "got float32 [40, 32, 32, 3]"),
    "channels first": ("test_images", np.zeros((20, 3, 32, 32), np.uint8), "got uint8 [20, 3, 32, 32]"),
    "flat images": ("train_images", np.zeros((40, 3072), np.uint8), "got uint8 [40, 3072]"),
    "no images": ("test_images", np.zeros((0, 32, 32, 3), np.uint8), "got uint8 [0, 32, 32, 3]"),
    "scalar images": ("train_images", np.uint8(1), "got uint8 []"),
    "float labels": ("train_labels", np.zeros(40), "got float64 [40]"),
    "boolean labels": ("test_labels", np.zeros(20, bool), "got bool [20]"),
    "too few labels": ("train_labels", np.zeros(39, np.int64), "got int64 [39]"),
    "one-hot labels": ("test_labels", np.zeros((20, 10), np.int64), "got int64 [20, 10]"),
    "label too large": ("train_labels", np.arange(40) % 11, "must hold train_labels within 0..9, got 0..10"),
    "negative label": ("test_labels", np.full(20, -1), "must hold test_labels within 0..9, got -1..-1"),
    "huge label": ("test_labels", np.full(20, 2**64 - 1, np.uint64), "got 18446744073709551615..184"),
    "numbers as names": ("classes", np.arange(10), "must hold classes as two or more strings, got int64 [10]"),
    "byte names": ("classes", np.array([b"a"] * 10), "must hold classes as two or more strings, got |S1 [10]"),
    "names of cifar100": ("classes", np.array(["a"] * 100), "must hold 10 classes, got 100"),
}


@pytest.mark.parametrize("case", WRONG_ARRAYS)
def test_wrong_dtype_shape_or_range_is_refused(tmp_path: Path, tiny_arrays: Arrays, case: str) -> None:
    """Every way in which an array can be wrong has a sentence with the file, what was got, and the cure."""
    key, wrong, problem = WRONG_ARRAYS[case]
    path = tmp_path / "cifar10.npz"
    np.savez(path, **{**tiny_arrays, key: wrong})
    message = load_error(path)
    assert message.startswith(f"{path} must hold {key if key != 'classes' else ''}")
    assert problem.replace("|S1", str(np.dtype("S1"))) in message
    assert message.endswith(CURE)


# From here on: torchvision's own files, with the real torchvision classes but tiny batches of known checksum.


def pickled(folder: Path, name: str, content: Any) -> list[str]:
    """Write one of torchvision's files and return its name and MD5, as torchvision lists them."""
    folder.mkdir(exist_ok=True)
    data = pickle.dumps(content)
    (folder / name).write_bytes(data)
    return [name, hashlib.md5(data).hexdigest()]


@pytest.fixture
def torchvision_folder(tmp_path: Path, tiny_arrays: Arrays, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write the tiny images the way the CIFAR-10 authors do: rows of 3,072 bytes, all red ones first."""
    from torchvision.datasets import CIFAR10

    folder = tmp_path / "cifar-10-batches-py"
    files = {}
    for name, split, part in (
        ("data_batch_1", "train", slice(0, 25)),
        ("data_batch_2", "train", slice(25, 40)),
        ("test_batch", "test", slice(None)),
    ):
        images = tiny_arrays[f"{split}_images"][part]
        content = {
            "data": images.transpose(0, 3, 1, 2).reshape(len(images), 3072),
            "labels": tiny_arrays[f"{split}_labels"][part].tolist(),
        }
        files[name] = pickled(folder, name, content)
    _, md5 = pickled(folder, "batches.meta", {"label_names": tiny_arrays["classes"].tolist()})
    monkeypatch.setattr(CIFAR10, "train_list", [files["data_batch_1"], files["data_batch_2"]])
    monkeypatch.setattr(CIFAR10, "test_list", [files["test_batch"]])
    monkeypatch.setattr(CIFAR10, "meta", {"filename": "batches.meta", "key": "label_names", "md5": md5})
    return folder


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[float | None]:
    """Make every request fail as without a network; return the socket time limits that were in force, in s."""
    limits: list[float | None] = []

    def unreachable(*args: Any, **kwargs: Any) -> None:
        limits.append(socket.getdefaulttimeout())
        raise urllib.error.URLError(OSError(-2, "Name or service not known"))

    monkeypatch.setattr(urllib.request, "urlopen", unreachable)
    return limits


def test_torchvision_folder_becomes_the_archive_without_network(
    torchvision_folder: Path, tiny_arrays: Arrays, no_network: list[float | None]
) -> None:
    """An earlier torchvision download must be used offline, and give the same arrays as the images it holds."""
    train, test, class_names = load_archive("cifar10", torchvision_folder.parent)
    expected = tiny_arrays["train_images"].transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(train.images.numpy(), expected)
    assert test.labels.tolist() == tiny_arrays["test_labels"].tolist()
    assert class_names == tiny_arrays["classes"].tolist()
    with np.load(torchvision_folder.parent / "cifar10.npz", allow_pickle=False) as written:
        for key, value in tiny_arrays.items():
            np.testing.assert_array_equal(written[key], value)
            assert written[key].dtype == value.dtype
    assert no_network == []


def test_damaged_torchvision_folder_is_refused(torchvision_folder: Path) -> None:
    """Torchvision's checksum failure becomes one sentence, and nothing is written."""
    (torchvision_folder / "data_batch_2").write_bytes(b"cut")
    data_dir = torchvision_folder.parent
    assert load_error(data_dir / "cifar10.npz") == (
        f"cifar10 could not be read from cifar-10-batches-py in {data_dir} "
        f"(RuntimeError: Dataset not found or corrupted); {FETCH}, "
        "give dataset.data_dir=DIR with a DIR that holds cifar10.npz, cifar-10-python.tar.gz or its folder "
        "cifar-10-batches-py, or use dataset=digits."
    )
    assert [path.name for path in data_dir.iterdir()] == ["cifar-10-batches-py"]


def test_fetch_uses_what_torchvision_already_has(torchvision_folder: Path, no_network: list[float | None]) -> None:
    """A whole torchvision folder is not downloaded again."""
    path = fetch_cifar("cifar10", torchvision_folder.parent)
    assert path == torchvision_folder.parent / "cifar10.npz"
    assert len(load_archive("cifar10", path.parent)[0]) == 40
    assert no_network == []


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("cifar10", "cifar-10-python.tar.gz or its folder cifar-10-batches-py"),
        ("cifar100", "cifar-100-python.tar.gz or its folder cifar-100-python"),
    ],
)
def test_fetch_without_network_is_one_sentence(
    tmp_path: Path, name: str, files: str, no_network: list[float | None]
) -> None:
    """Torchvision's failure names the data set, the folder, the cause and the cure; waits are bounded."""
    with pytest.raises(DataError) as caught:
        fetch_cifar(name, tmp_path / "new")
    assert str(caught.value) == (
        f"{name} could not be downloaded into {tmp_path / 'new'} "
        "(URLError: <urlopen error [Errno -2] Name or service not known>); try again where there is a network, "
        f"give dataset.data_dir=DIR with a DIR that holds {name}.npz, {files}, or use dataset=digits."
    )
    assert no_network
    assert set(no_network) == {30.0}
    assert socket.getdefaulttimeout() is None
    assert not (tmp_path / "new").exists()


def test_fetch_of_an_unknown_name_lists_the_choices(tmp_path: Path) -> None:
    """A typing error is answered with the names there are."""
    with pytest.raises(DataError, match=r"^Cannot download data set 'cifar'; choose from cifar10, cifar100\.$"):
        fetch_cifar("cifar", tmp_path)


def test_failed_write_leaves_neither_archive_nor_remains(
    torchvision_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that fills up midway must not leave a file that the next run would take for the archive."""

    def full_disk(file: Any, **arrays: Any) -> None:
        file.write(b"PK")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full_disk)
    data_dir = torchvision_folder.parent
    assert load_error(data_dir / "cifar10.npz") == (
        f"{data_dir / 'cifar10.npz'} could not be written (OSError: [Errno 28] No space left on device); "
        "free space there or choose another data_dir."
    )
    assert [path.name for path in data_dir.iterdir()] == ["cifar-10-batches-py"]


def test_torchvision_that_does_not_import_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A torchvision made for another torch must lead to a cure, not to a traceback."""
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(DataError, match=r"torchvision fails to import \(.*\); install a torchvision that"):
        fetch_cifar("cifar10", tmp_path)


def test_importing_the_package_imports_neither_torchvision_nor_sklearn() -> None:
    """Both take seconds, which only those who fetch CIFAR or train on digits should pay."""
    code = "import sys, kfac_sua.data; sys.exit(len({'torchvision', 'sklearn'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
