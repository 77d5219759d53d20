"""CIFAR through torchvision: read from its folder or its ``.tar.gz``, or downloaded, and written as one archive.

Incomplete files are never used: torchvision checks the MD5 of the download and of every file in it, all work is done in
a hidden folder beside the archive, and the archive is moved into place whole. If a killed process leaves a download in
that folder, the next one uses it if its checksum is right, and removes it in any case.
"""

from __future__ import annotations

import contextlib
import http.client
import io
import os
import pickle
import shutil
import socket
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kfac_sua.data.splits import DataError
from kfac_sua.data.turn import turn
from kfac_sua.files.openers import refuse_special

NETWORK_TIMEOUT_S = 30.0
"""Longest silence of the server. The whole download may take any time."""

FETCH_COMMANDS = "`make data` or `python -m kfac_sua.data.download`"  # in a checkout, and everywhere

# Errors of torchvision's download, extraction and unpickling. It raises RuntimeError for a wrong checksum.
_READ_ERRORS = (
    OSError,
    RuntimeError,
    EOFError,
    http.client.HTTPException,
    tarfile.TarError,
    pickle.UnpicklingError,
)


@dataclass(frozen=True)
class _TorchvisionSource:
    """How torchvision calls a data set: its class, its extracted folder and its download."""

    class_name: str
    folder: str
    download: str

    def is_in(self, data_dir: Path) -> bool:
        """Whether something of torchvision's lies in a folder, whole or not."""
        return (data_dir / self.folder).is_dir() or (data_dir / self.download).is_file()


CIFAR_SOURCES = {
    "cifar10": _TorchvisionSource("CIFAR10", "cifar-10-batches-py", "cifar-10-python.tar.gz"),
    "cifar100": _TorchvisionSource("CIFAR100", "cifar-100-python", "cifar-100-python.tar.gz"),
}


def where_else(name: str) -> str:
    """Return in words where else a data set may lie, for a message.

    Args:
        name: Data set.
    """
    source = CIFAR_SOURCES.get(name)
    torchvisions = f", {source.download} or its folder {source.folder}" if source else ""
    return f"give dataset.data_dir=DIR with a DIR that holds {name}.npz{torchvisions}"


def make_archive(name: str, path: Path, *, download: bool) -> None:
    """Write the archive of a CIFAR data set, if no other process does so in the meantime.

    Of several processes that call this, one does the work; the others wait for it, however long it takes.

    Args:
        name: A key of ``CIFAR_SOURCES``.
        path: Where the archive belongs; torchvision's files are looked for beside it.
        download: Whether to download what is not there.

    Raises:
        DataError: If torchvision's files are damaged, there is no network, what comes is not what it should be, or
            nothing can be written.
        KeyboardInterrupt: On Ctrl-C, with a sentence if it interrupts a download.
    """
    staging = path.with_name(f".{name}.partial")
    try:
        with turn(path.with_name(f".{name}.lock"), lambda: _tell(f"waiting for another process, which makes {path}")):
            if path.exists():
                return
            try:
                _clear(staging, CIFAR_SOURCES[name].download)
                train, test = _read(name, path, staging, download=download)
                partial = staging / path.name
                with partial.open("wb") as file:
                    np.savez(file, **_arrays(train, test))  # type: ignore[arg-type] # its own allow_pickle is a bool
                    file.flush()
                    os.fsync(file.fileno())
                partial.replace(path)
            finally:
                shutil.rmtree(staging, ignore_errors=True)
    except OSError as error:
        raise DataError(
            f"{path} could not be written ({one_line(error)}); free space there or choose another data_dir."
        ) from error


def _clear(staging: Path, download: str) -> None:
    """Make a directory for this process, empty except for a download that a killed process has left there."""
    if staging.is_symlink():  # all that is written inside would land elsewhere
        staging.unlink()
    staging.mkdir(exist_ok=True)
    for path in staging.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != download or path.is_symlink() or not path.is_file():
            path.unlink()


def read_torchvision(name: str, path: Path) -> dict[str, NDArray[Any]]:
    """Return the arrays of a CIFAR data set from torchvision's files, without writing beside them.

    Args:
        name: A key of ``CIFAR_SOURCES``.
        path: Where its archive would be; torchvision's files are looked for beside it.

    Raises:
        DataError: If they are damaged.
    """
    with tempfile.TemporaryDirectory() as staging:
        return _arrays(*_read(name, path, Path(staging), download=False))


def _read(name: str, path: Path, staging: Path, *, download: bool) -> tuple[Any, Any]:
    """Return torchvision's training and test set, from wherever they are whole."""
    source, data_dir = CIFAR_SOURCES[name], path.parent
    try:
        # Imported here alone: it takes seconds, and fails on builds of torch that it was not made for.
        from torchvision import datasets
        from torchvision.datasets.utils import check_integrity, extract_archive
    except (ImportError, RuntimeError) as error:
        raise DataError(
            f"{path} cannot be made because torchvision fails to import ({one_line(error)}); "
            "install a torchvision that matches torch, put the file there, or use dataset=digits."
        ) from error
    dataset = getattr(datasets, source.class_name)

    # --- Without the network ----------------------------------------------------------------------------------------
    reason = f"{path} does not exist"
    for found in (data_dir / source.folder, data_dir / source.download):
        if not found.exists():
            continue
        try:
            for path in found.iterdir() if found.is_dir() else [found]:
                if not path.is_dir():  # torchvision would wait for a named pipe
                    refuse_special(path)
            if found.name == source.folder:
                return _both(dataset, data_dir)
            if not check_integrity(found, dataset.tgz_md5):
                raise RuntimeError("its checksum is wrong: it is incomplete or another file")
            extract_archive(found, staging)
            return _both(dataset, staging)
        except _READ_ERRORS as error:
            reason = f"{name} could not be read from {found.name} in {data_dir} ({one_line(error)})"
            if download:
                _tell(f"{reason}; it is left as it is")
    if not download:
        raise DataError(
            f"{reason}; run {FETCH_COMMANDS} where there is a network, {where_else(name)}, or use dataset=digits."
        )

    # --- With it ----------------------------------------------------------------------------------------------------
    _tell(f"downloading {name} into {data_dir} from {dataset.url}")
    try:
        with _network_timeout(NETWORK_TIMEOUT_S), _bar_in_terminal_only():
            return _both(dataset, staging, download=True)
    except _READ_ERRORS as error:
        raise DataError(
            f"{name} could not be downloaded into {data_dir} ({_reason(error)}); try again where there is a network, "
            f"{where_else(name)}, or use dataset=digits."
        ) from error
    except KeyboardInterrupt as interrupt:
        interrupt.args = interrupt.args or (f"interrupted; the same command downloads {name} again.",)
        raise


def _both(dataset: Any, root: Path, *, download: bool = False) -> tuple[Any, Any]:
    return dataset(root, train=True, download=download), dataset(root, train=False)


def _arrays(train: Any, test: Any) -> dict[str, NDArray[Any]]:
    return {
        "train_images": train.data,
        "train_labels": np.array(train.targets, dtype=np.uint8),
        "test_images": test.data,
        "test_labels": np.array(test.targets, dtype=np.uint8),
        "classes": np.array(train.classes),
    }


@contextmanager
def _network_timeout(seconds: float) -> Iterator[None]:
    """Bound every wait for the network; torchvision sets no limit and would hang behind a firewall."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


@contextmanager
def _bar_in_terminal_only() -> Iterator[None]:
    """Keep torchvision's progress bar, which knows no terminal from a file, out of logs."""
    with contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO()):
        yield


def _tell(line: str) -> None:
    print(line, flush=True)


def _reason(error: BaseException) -> str:
    """Return in words what went wrong with a download, as messages of Python and torchvision are terse."""
    if isinstance(error, TimeoutError) or isinstance(getattr(error, "reason", None), TimeoutError):
        return f"the server was silent for {NETWORK_TIMEOUT_S:g} s"
    if type(error) is RuntimeError:  # torchvision's own; too many redirects are one of its kinds
        return "the checksum of what came is wrong: it is incomplete or another file"
    return one_line(error)


def one_line(error: BaseException) -> str:
    """Return the type and the first sentence of an error on one line, without its full stop.

    Args:
        error: What was raised.
    """
    sentence = " ".join(str(error).split()).split(". ")[0]
    return f"{type(error).__name__}: {sentence}".rstrip(" .:")
