"""Image archives on disk: ``<data_dir>/<name>.npz``, read with checks, and made of CIFAR where it is missing.

An archive holds ``train_images`` and ``test_images`` (uint8 ``[num_images, 32, 32, 3]``, RGB),
``train_labels`` and ``test_labels`` (integers), and ``classes`` (names in the order of the labels). It loads
in a fraction of the time of torchvision's pickled batches and runs no code while being read.
"""

from __future__ import annotations

import contextlib
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.lib.format import MAGIC_PREFIX, read_array_header_1_0, read_array_header_2_0, read_magic
from numpy.typing import NDArray

from kfac_sua.data.cifar import CIFAR_SOURCES, FETCH_COMMANDS, make_archive, one_line, read_torchvision, where_else
from kfac_sua.data.sizes import IMAGE_SHAPE, SIZES
from kfac_sua.data.splits import DataError, ImageSet
from kfac_sua.files.openers import regular_file
from kfac_sua.preconditioner.large import device_memory

Array = NDArray[Any]

CIFAR_GIB = 0.4
"""What CIFAR takes: 60,000 images of 3,072 bytes, twice while their channels are moved to the front."""

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
        DataError: If the archive is missing and cannot be made, unreadable, incomplete, too large for the memory, or
            holds arrays of a wrong dtype, shape, length or label range; the message names the file and the cure.

    Reference: Laurent et al. (2018), Sec. 3 (CIFAR-10) and 3.2 (CIFAR-100).
    """
    path, size = archive_path(name, data_dir), SIZES.get(name)
    num_classes = size.classes if size else None
    if is_at_hand(name, data_dir) and not path.exists():
        arrays = read_torchvision(name, path)
        _check_kinds(path, arrays, num_classes)
    else:
        arrays = _read_arrays(provide_archive(name, data_dir, download=download), num_classes)
    class_names = [str(name) for name in arrays["classes"]]
    for split in ("train", "test"):
        _check_labels(path, arrays, split, len(class_names))
    try:
        train, test = (_image_set(arrays, split) for split in ("train", "test"))
    except (MemoryError, RuntimeError) as error:  # PyTorch's allocator raises the latter
        raise _not_free(path, arrays) from error
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
    """Make sure that an archive exists; that of CIFAR is made from torchvision's files, which it may download.

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


def _read_arrays(path: Path, num_classes: int | None) -> dict[str, Array]:
    """Read the required arrays of an archive after checking their headers; nothing is unpickled."""
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(open(path, "rb", opener=regular_file))
        except OSError as error:
            raise _damaged(path, f"is not a readable .npz archive ({error.strerror})") from error
        if not zipfile.is_zipfile(file):
            # A truncated download fails here too, as a zip file has its table of contents at the end.
            raise _damaged(
                path, "is not a readable .npz archive (truncated, not accessible, or a file of another kind)"
            )
        file.seek(0)
        heads = _read_each(path, lambda archive, key: _head(archive.zip, key), file)
        _check_kinds(path, heads, num_classes)
        memory = device_memory(torch.device("cpu"))
        if memory is not None and _needed_bytes(heads) > memory:
            problem = f"{_need(heads)}, where this machine has {memory / 2**30:.1f} GiB and CIFAR needs {CIFAR_GIB} GiB"
            raise _damaged(path, problem)
        file.seek(0)
        try:
            return _read_each(path, lambda archive, key: archive[key], file)
        except MemoryError as error:
            raise _not_free(path, heads) from error


def _read_each(path: Path, read: Callable[[Any, str], Any], file: BinaryIO) -> dict[str, Array]:
    """Return what ``read`` gives for each required array, or raise with the name of the one that cannot be read."""
    arrays = {}
    try:
        with np.load(file, allow_pickle=False) as archive:
            missing = [key for key in REQUIRED_ARRAYS if key not in archive.files]
            if missing:
                found = ", ".join(archive.files) or "nothing"
                raise _damaged(path, f"has no array {', '.join(missing)} (it holds {found})")
            for key in REQUIRED_ARRAYS:
                arrays[key] = read(archive, key)
    except (DataError, MemoryError):
        raise
    except Exception as error:  # zipfile, its decompressors and NumPy's header parser raise a dozen types
        culprit = f"array '{REQUIRED_ARRAYS[len(arrays)]}'"
        raise _damaged(path, f"cannot be read at {culprit} ({one_line(error)})") from error
    return arrays


def _head(members: zipfile.ZipFile, key: str) -> Any:
    """Return an array of the shape and dtype in the header, with one value for all; bytes if the member is no array."""
    name = key if key in members.namelist() else f"{key}.npy"
    with members.open(name) as member:
        if member.read(len(MAGIC_PREFIX)) != MAGIC_PREFIX:
            return b""
    with members.open(name) as member:
        read_header = read_array_header_1_0 if read_magic(member) == (1, 0) else read_array_header_2_0
        shape, _, dtype = read_header(member)
    if dtype.hasobject:
        raise ValueError("Object arrays cannot be loaded when allow_pickle=False")  # NumPy's words
    head = np.broadcast_to(np.zeros((), dtype), shape)
    num_bytes = members.getinfo(name).file_size
    if num_bytes < head.nbytes:  # NumPy would allocate memory that nothing fills
        raise ValueError(f"it holds {num_bytes:,} bytes, where its header speaks of {head.nbytes:,}")
    return head


def _check_kinds(path: Path, arrays: dict[str, Array], num_classes: int | None) -> None:
    """Check types and shapes, and the number of classes unless it is None, as for unknown data sets."""
    classes = arrays["classes"]
    if not _is_array(classes, np.str_) or classes.ndim != 1 or len(classes) < 2:
        raise _damaged(path, f"must hold classes as two or more strings, got {_described(classes)}")
    if num_classes is not None and len(classes) != num_classes:
        raise _damaged(path, f"must hold {num_classes} classes, got {len(classes)}")
    channels, height, width = IMAGE_SHAPE
    for split in ("train", "test"):
        images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
        if not _is_array(images, np.uint8) or images.shape[1:] != (height, width, channels) or len(images) == 0:
            shape = f"[num_images, {height}, {width}, {channels}]"
            raise _damaged(path, f"must hold {split}_images as uint8 {shape}, got {_described(images)}")
        if not _is_array(labels, np.integer) or labels.shape != images.shape[:1]:
            raise _damaged(path, f"must hold {split}_labels as integers [{len(images)}], got {_described(labels)}")


def _check_labels(path: Path, arrays: dict[str, Array], split: str, num_classes: int) -> None:
    labels = arrays[f"{split}_labels"]
    if labels.min() < 0 or labels.max() >= num_classes:
        raise _damaged(
            path, f"must hold {split}_labels within 0..{num_classes - 1}, got {labels.min()}..{labels.max()}"
        )


def _image_set(arrays: dict[str, Array], split: str) -> ImageSet:
    """Convert the images and labels of one split to tensors."""
    images = torch.from_numpy(arrays[f"{split}_images"]).permute(0, 3, 1, 2).contiguous()  # [num_images, 3, 32, 32]
    return ImageSet(images, torch.from_numpy(arrays[f"{split}_labels"].astype(np.int64)))


def _needed_bytes(arrays: dict[str, Array]) -> int:
    """Return the bytes that reading and converting arrays takes; while it converts, there are two of each."""
    return 2 * sum(array.nbytes for array in arrays.values())


def _need(arrays: dict[str, Array]) -> str:
    num_images = len(arrays["train_images"]) + len(arrays["test_images"])
    return f"needs {_needed_bytes(arrays) / 2**30:.1f} GiB of memory for {num_images:,} images"


def _not_free(path: Path, arrays: dict[str, Array]) -> DataError:
    """Return the error for a sound archive that does not fit into free memory."""
    return DataError(
        f"{path} {_need(arrays)}, more than is free, where CIFAR needs {CIFAR_GIB} GiB; end other programs, or put a "
        f"smaller {path.name} there."
    )


def _is_array(value: Any, kind: type[Any]) -> bool:
    """Tell whether ``value`` is an array of that kind; a zip member that is no array is read as bytes."""
    return isinstance(value, np.ndarray) and np.issubdtype(value.dtype, kind)


def _described(value: Any) -> str:
    """Return in words what a wrong value is, for a message."""
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, np.ndarray) else "something else"


def _damaged(path: Path, problem: str) -> DataError:
    """Return the error for an archive that is there but unusable."""
    return DataError(
        f"{path} {problem}; delete it and run {FETCH_COMMANDS} where there is a network, "
        f"put a whole {path.name} there, or use dataset=digits."
    )
