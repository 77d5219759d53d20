"""Image archives on disk: ``<data_dir>/<name>.npz``, read with checks, and made of CIFAR where it is missing.

An archive holds ``train_images`` and ``test_images`` (uint8 ``[num_images, 32, 32, 3]``, RGB),
``train_labels`` and ``test_labels`` (integers), and ``classes`` (names in the order of the labels). It loads
in a fraction of the time of torchvision's pickled batches and runs no code while being read.
"""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kfac_sua.data.cifar import CIFAR_SOURCES, FETCH_COMMANDS, make_archive, one_line, read_torchvision, where_else
from kfac_sua.data.splits import DataError, ImageSet

Array = NDArray[Any]

REQUIRED_ARRAYS = ("train_images", "train_labels", "test_images", "test_labels", "classes")


def archive_path(name: str, data_dir: str | Path = "data") -> Path:
    """Return where the archive of data set ``name`` lies: ``<data_dir>/<name>.npz``.

    Args:
        name: Data set, such as ``"cifar10"``.
        data_dir: Folder of all data sets.

    Returns:
        The path, whether or not the file exists.
    """
    return Path(data_dir) / f"{name}.npz"


def load_archive(
    name: str, data_dir: str | Path = "data", *, download: bool = False
) -> tuple[ImageSet, ImageSet, list[str]]:
    """Read an archive and check everything about it that the rest of the project relies on.

    Where the archive is missing, it is first made as :func:`provide_archive` does.

    Args:
        name: Data set; ``"cifar10"`` and ``"cifar100"`` are known, any other name needs its ``.npz`` in
            place.
        data_dir: Folder of all data sets.
        download: Whether the network may be used.

    Returns:
        Training images, test images (uint8 ``[num_images, 3, 32, 32]``, contiguous), and the class names.

    Raises:
        DataError: If the archive is missing and cannot be made, unreadable, incomplete, or holds arrays of a wrong
            dtype, shape, length or label range; the message names the file and the cure.

    Reference: Laurent et al. (2018), Sec. 3 (CIFAR-10) and 3.2 (CIFAR-100).
    """
    source, path = CIFAR_SOURCES.get(name), archive_path(name, data_dir)
    if is_at_hand(name, data_dir) and not path.exists():
        arrays = read_torchvision(name, path)
    else:
        arrays = _read_arrays(provide_archive(name, data_dir, download=download))
    class_names = _check_classes(path, arrays["classes"], source.num_classes if source else None)
    train, test = (_checked_image_set(path, arrays, split, len(class_names)) for split in ("train", "test"))
    return train, test, class_names


def is_at_hand(name: str, data_dir: str | Path = "data") -> bool:
    """Return whether a data set can be loaded without writing anything.

    That is so if its archive is there, or torchvision's files in a folder that cannot be written to, such as one that a
    cluster's users share: these are then read every time.

    Args:
        name: Data set.
        data_dir: Folder of all data sets.
    """
    path, source = archive_path(name, data_dir), CIFAR_SOURCES.get(name)
    return path.exists() or (source is not None and source.is_in(path.parent) and not os.access(path.parent, os.W_OK))


def provide_archive(name: str, data_dir: str | Path = "data", *, download: bool) -> Path:
    """See to it that an archive is there: of CIFAR it is made of what torchvision has, or downloads.

    Args:
        name: Data set.
        data_dir: Folder of all data sets.
        download: Whether the network may be used if neither torchvision's folder nor its ``.tar.gz`` is there.

    Returns:
        Path of the archive, which has not been read.

    Raises:
        DataError: If it is not there and cannot be made; the message names the file and the cure.
    """
    path = archive_path(name, data_dir)
    if path.exists():
        return path
    source = CIFAR_SOURCES.get(name)
    # A link that leads nowhere, as to a disk that is not mounted, is not replaced.
    if source is None or path.is_symlink() or not (download or source.is_in(path.parent)):
        raise DataError(
            f"{path} does not exist; run {FETCH_COMMANDS} where there is a network, {where_else(name)}, or use "
            "dataset=digits."
        )
    make_archive(name, path, download=download)
    return path


def fetch_cifar(name: str, data_dir: str | Path = "data") -> Path:
    """Download a CIFAR data set through torchvision, which verifies its checksums, and write the archive.

    The archive appears under its name only once it is complete. Where it or torchvision's own files are whole already,
    nothing is downloaded.

    Args:
        name: ``"cifar10"`` or ``"cifar100"``.
        data_dir: Folder of all data sets; created if missing.

    Returns:
        Path of the archive.

    Raises:
        DataError: If ``name`` is unknown, the network is missing, the download is damaged, or the folder
            cannot be written; the message says which.
    """
    if name not in CIFAR_SOURCES:
        raise DataError(f"Cannot download data set '{name}'; choose from {', '.join(CIFAR_SOURCES)}.")
    return provide_archive(name, data_dir, download=True)


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
        raise _damaged(path, f"cannot be read at {culprit} ({one_line(error)})") from error
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
        f"{path} {problem}; delete it and run {FETCH_COMMANDS} where there is a network, "
        f"put a whole {path.name} there, or use dataset=digits."
    )
