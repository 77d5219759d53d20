"""Image archives on disk: ``<data_dir>/<name>.npz``, read with checks, or written from torchvision's CIFAR.

An archive holds ``train_images`` and ``test_images`` (uint8 ``[num_images, 32, 32, 3]``, RGB),
``train_labels`` and ``test_labels`` (integers), and ``classes`` (names in the order of the labels). It loads
in a fraction of the time of torchvision's pickled batches and runs no code while being read.
"""

from __future__ import annotations

import http.client
import os
import pickle
import socket
import tarfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kfac_sua.data.splits import DataError, ImageSet

Array = NDArray[Any]

REQUIRED_ARRAYS = ("train_images", "train_labels", "test_images", "test_labels", "classes")
NETWORK_TIMEOUT_S = 30.0

_FETCH = "`make data` or `python -m kfac_sua.data.download`"  # in a checkout, and everywhere

# What torchvision's download, extraction and unpickling raise; RuntimeError is its own checksum failure.
_FETCH_ERRORS = (
    OSError,
    RuntimeError,
    EOFError,
    http.client.HTTPException,
    tarfile.TarError,
    pickle.UnpicklingError,
)


@dataclass(frozen=True)
class _TorchvisionSource:
    """How torchvision calls a data set: its class, its extracted folder, and the number of classes."""

    class_name: str
    folder: str
    num_classes: int


CIFAR_SOURCES = {
    "cifar10": _TorchvisionSource("CIFAR10", "cifar-10-batches-py", 10),
    "cifar100": _TorchvisionSource("CIFAR100", "cifar-100-python", 100),
}


def archive_path(name: str, data_dir: str | Path = "data") -> Path:
    """Return where the archive of data set ``name`` lies: ``<data_dir>/<name>.npz``.

    Args:
        name: Data set, such as ``"cifar10"``.
        data_dir: Folder of all data sets.

    Returns:
        The path, whether or not the file exists.
    """
    return Path(data_dir) / f"{name}.npz"


def load_archive(name: str, data_dir: str | Path = "data") -> tuple[ImageSet, ImageSet, list[str]]:
    """Read an archive and check everything about it that the rest of the project relies on.

    Never uses the network. Where the archive is missing but torchvision's extracted CIFAR folder lies in
    ``data_dir``, the archive is first written from that folder.

    Args:
        name: Data set; ``"cifar10"`` and ``"cifar100"`` are known, any other name needs its ``.npz`` in
            place.
        data_dir: Folder of all data sets.

    Returns:
        Training images, test images (uint8 ``[num_images, 3, 32, 32]``, contiguous), and the class names.

    Raises:
        DataError: If the archive is missing, unreadable, incomplete, or holds arrays of a wrong dtype, shape,
            length or label range; the message names the file and the cure.

    Reference: Laurent et al. (2018), Sec. 3 (CIFAR-10) and 3.2 (CIFAR-100).
    """
    path = archive_path(name, data_dir)
    source = CIFAR_SOURCES.get(name)
    if not path.exists():
        if source is None or not (path.parent / source.folder).is_dir():
            raise DataError(
                f"{path} does not exist; run {_FETCH} where there is a network, put the file there, "
                "or use dataset=digits."
            )
        _write_from_torchvision(name, path.parent, download=False)
    arrays = _read_arrays(path)
    class_names = _check_classes(path, arrays["classes"], source.num_classes if source else None)
    train, test = (_checked_image_set(path, arrays, split, len(class_names)) for split in ("train", "test"))
    return train, test, class_names


def fetch_cifar(name: str, data_dir: str | Path = "data") -> Path:
    """Download a CIFAR data set through torchvision, which verifies its checksum, and write the archive.

    The archive appears under its name only once it is complete. Torchvision's own files stay in ``data_dir``;
    where they are whole already, nothing is downloaded.

    Args:
        name: ``"cifar10"`` or ``"cifar100"``.
        data_dir: Folder of all data sets; created if missing.

    Returns:
        Path of the written archive.

    Raises:
        DataError: If ``name`` is unknown, the network is missing, the download is damaged, or the folder
            cannot be written; the message says which.
    """
    if name not in CIFAR_SOURCES:
        raise DataError(f"Cannot download data set '{name}'; choose from {', '.join(CIFAR_SOURCES)}.")
    return _write_from_torchvision(name, Path(data_dir), download=True)


def _write_from_torchvision(name: str, data_dir: Path, *, download: bool) -> Path:
    """Write the archive of a CIFAR data set from torchvision's files in ``data_dir``."""
    source, path = CIFAR_SOURCES[name], archive_path(name, data_dir)
    try:
        # Imported here alone: it takes seconds, and fails on builds of torch that it was not made for.
        from torchvision import datasets
    except (ImportError, RuntimeError) as error:
        raise DataError(
            f"{path} cannot be made because torchvision fails to import ({_one_line(error)}); "
            "install a torchvision that matches torch, put the file there, or use dataset=digits."
        ) from error
    dataset_class = getattr(datasets, source.class_name)
    try:
        with _network_timeout(NETWORK_TIMEOUT_S):
            train = dataset_class(data_dir, train=True, download=download)
            test = dataset_class(data_dir, train=False, download=False)
    except _FETCH_ERRORS as error:
        action = "downloaded into" if download else f"read from {source.folder} in"
        raise DataError(
            f"{name} could not be {action} {data_dir} ({_one_line(error)}); "
            f"run {_FETCH} where there is a network, put {path.name} there, or use dataset=digits."
        ) from error
    _save_atomically(
        path,
        {
            "train_images": train.data,
            "train_labels": np.array(train.targets, dtype=np.uint8),
            "test_images": test.data,
            "test_labels": np.array(test.targets, dtype=np.uint8),
            "classes": np.array(train.classes),
        },
    )
    return path


def _save_atomically(path: Path, arrays: dict[str, Array]) -> None:
    """Write the archive beside ``path`` and rename it, so that a cut write never leaves a broken one."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type] # its own keyword allow_pickle is a bool
        partial.replace(path)
    except OSError as error:
        raise DataError(
            f"{path} could not be written ({_one_line(error)}); free space there or choose another data_dir."
        ) from error
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def _network_timeout(seconds: float) -> Iterator[None]:
    """Bound every wait for the network; torchvision sets no limit and would hang behind a firewall."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _read_arrays(path: Path) -> dict[str, Array]:
    """Read the required arrays of an archive, without ever unpickling."""
    if not zipfile.is_zipfile(path):
        # Also what a cut download looks like: a zip file keeps its table of contents at the end.
        raise _damaged(path, "is not a readable .npz archive (truncated, not accessible, or a file of another kind)")
    arrays = {}
    try:
        with np.load(path, allow_pickle=False) as archive:
            missing = [key for key in REQUIRED_ARRAYS if key not in archive.files]
            if missing:
                found = ", ".join(archive.files) or "nothing"
                raise _damaged(path, f"has no array {', '.join(missing)} (it holds {found})")
            for key in REQUIRED_ARRAYS:
                arrays[key] = archive[key]
    except DataError:
        raise
    except Exception as error:  # zipfile, its decompressors and NumPy's header parser raise a dozen types
        culprit = f"array '{REQUIRED_ARRAYS[len(arrays)]}'"
        raise _damaged(path, f"cannot be read at {culprit} ({_one_line(error)})") from error
    return arrays


def _checked_image_set(path: Path, arrays: dict[str, Array], split: str, num_classes: int) -> ImageSet:
    """Check the images and labels of one split, and convert them to tensors."""
    images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
    if not _is_array(images, np.uint8) or images.shape[1:] != (32, 32, 3) or len(images) == 0:
        raise _damaged(path, f"must hold {split}_images as uint8 [num_images, 32, 32, 3], got {_described(images)}")
    if not _is_array(labels, np.integer) or labels.shape != images.shape[:1]:
        raise _damaged(path, f"must hold {split}_labels as integers [{len(images)}], got {_described(labels)}")
    if labels.min() < 0 or labels.max() >= num_classes:
        raise _damaged(
            path,
            f"must hold {split}_labels within 0..{num_classes - 1}, got {labels.min()}..{labels.max()}",
        )
    channels_first = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()  # [num_images, 3, 32, 32]
    return ImageSet(channels_first, torch.from_numpy(labels.astype(np.int64)))


def _check_classes(path: Path, classes: Array, expected: int | None) -> list[str]:
    """Check the class names, of which ``expected`` are needed where the data set is a known one."""
    if not _is_array(classes, np.str_) or classes.ndim != 1 or len(classes) < 2:
        raise _damaged(path, f"must hold classes as two or more strings, got {_described(classes)}")
    if expected is not None and len(classes) != expected:
        raise _damaged(path, f"must hold {expected} classes, got {len(classes)}")
    return [str(name) for name in classes]


def _is_array(value: Any, kind: type[Any]) -> bool:
    """Tell whether ``value`` is an array of that kind; a zip member that is no array is read as bytes."""
    return isinstance(value, np.ndarray) and np.issubdtype(value.dtype, kind)


def _described(value: Any) -> str:
    """Say what a wrong value is, for a message."""
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, np.ndarray) else "something else"


def _damaged(path: Path, problem: str) -> DataError:
    """Return the error for an archive that is there but unusable."""
    return DataError(
        f"{path} {problem}; delete it and run {_FETCH} where there is a network, "
        f"put a whole {path.name} there, or use dataset=digits."
    )


def _one_line(error: BaseException) -> str:
    """Return the type and the first sentence of an error on one line, without its full stop."""
    sentence = " ".join(str(error).split()).split(". ")[0]
    return f"{type(error).__name__}: {sentence}".rstrip(" .:")
