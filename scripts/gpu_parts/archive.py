"""All files of a report in one small archive, ``gpu-report.tar.gz``."""

from __future__ import annotations

import tarfile
from collections.abc import Callable
from pathlib import Path

NAME = "gpu-report.tar.gz"
REPORT = "report.md"
LIMIT = 16 * 2**20
"""Size that the archive stays below, in bytes."""

_NEVER = ("*.pt", "*.state", "events.out.tfevents.*", "*.npz", ".lock", "*.tmp", NAME)


def write_archive(out: Path, describe: Callable[[list[str]], None], limit: int = LIMIT) -> list[str]:
    """Write the archive into the directory that it is made of.

    Checkpoints, TensorBoard's files and data are never part of it. If it gets too large, the largest logs are left out,
    then the largest other files.

    Args:
        out: The directory.
        describe: Writes the report, which is part of the archive, given what is left out of it.
        limit: Bytes that the archive must stay under.

    Returns:
        The files left out because of the limit.
    """
    files = [path for path in sorted(out.rglob("*")) if path.is_file() and not any(map(path.match, _NEVER))]
    files = [path for path in files if path != out / REPORT]
    left_out: list[str] = []
    while True:
        describe(left_out)
        _write(out, [out / REPORT, *files])
        if (out / NAME).stat().st_size < limit or not files:
            return left_out
        largest = max(files, key=lambda path: (path.suffix == ".log", path.stat().st_size))
        files.remove(largest)
        left_out.append(str(largest.relative_to(out)))


def _write(out: Path, files: list[Path]) -> None:
    temporary = out / f"{NAME}.tmp"
    with tarfile.open(temporary, "w:gz") as archive:
        for path in files:
            archive.add(path, Path(out.name) / path.relative_to(out))
    temporary.replace(out / NAME)
