"""metrics.csv: one row per epoch.

Rows are appended and synchronised one at a time, so a crash tears at most the last one.
"""

import dataclasses
import hashlib
import math
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_type_hints

from kfac_sua.files.atomic import named_in_errors, write_atomically
from kfac_sua.files.openers import own_file, read_regular
from kfac_sua.runs.run_info import RecordError, RunInfo


@dataclasses.dataclass(frozen=True)
class EpochRecord:
    """One row of metrics.csv.

    Errors are fractions in [0, 1], losses nats, and times seconds accumulated since the run's start. ``train_loss``
    and ``train_error`` are means over the epoch's mini-batches, each before its own step; in row 0, the untrained
    network, they are those of evaluation mode on the fixed training subset, as ``train_eval_loss`` is everywhere.

    ``train_time_s`` is wall time: in each epoch, from the request for the first mini-batch to the end of the last step.
    It is the sum of the five columns after it, ``data_s`` (making mini-batches), ``other_s`` (metrics, progress and the
    loop itself) and ``captured_s`` (captured steps, which the device replays as a whole). ``evaluation_s`` and
    ``writing_s`` (records and checkpoints before this row) are not part of it. Older files lack these five columns,
    which are read as zero; ``forward_backward_s`` includes the time for data there.

    The other columns are for diagnosis (``training/diagnostics.py``): ``current_damping`` is the damping of the next
    refresh, NaN for the baseline. The next four are means over the measured steps of the epoch, NaN if no step was
    measured; ``kl_scale`` is NaN without ``kl_clip``. The last three count since the run's start. Older files lack
    these columns, which are read as NaN and zero.
    """

    epoch: int
    step: int
    lr: float
    train_loss: float
    train_error: float
    train_eval_loss: float
    val_loss: float
    val_error: float
    train_time_s: float
    forward_backward_s: float
    statistics_s: float
    inversion_s: float
    application_s: float
    optimizer_s: float
    data_s: float = 0.0
    other_s: float = 0.0
    evaluation_s: float = 0.0
    writing_s: float = 0.0
    captured_s: float = 0.0
    current_damping: float = math.nan
    gradient_norm: float = math.nan
    update_norm: float = math.nan
    update_cosine: float = math.nan
    kl_scale: float = math.nan
    numerical_faults: int = 0
    other_events: int = 0
    skipped_steps: int = 0


def _header(columns: Sequence[str]) -> bytes:
    return (",".join(columns) + "\n").encode("ascii")


COLUMN_TYPES: dict[str, type[int] | type[float]] = get_type_hints(EpochRecord)
COLUMNS = tuple(COLUMN_TYPES)
_HEADER = _header(COLUMNS)
# Header -> number of columns, for every file that can be read: today's header, and three older ones without the last 8,
# 9 or 13 columns.
_HEADERS = {_header(COLUMNS[:count]): count for count in (len(COLUMNS), *(len(COLUMNS) - few for few in (8, 9, 13)))}
_NUM_IN_OLDEST_DIGESTS = COLUMNS.index("captured_s")
_DEFAULTS = {field.name: field.default for field in dataclasses.fields(EpochRecord)}

MAY_BE_UNMEASURED = ("current_damping", "gradient_norm", "update_norm", "update_cosine", "kl_scale")
"""Columns that are NaN where there is nothing to measure."""

# Least and largest value of each column. Losses have no bounds: they may be anything, NaN included.
_BOUNDS = {
    name: (0, 1) if name.endswith("_error") else (0, sys.float_info.max)
    for name in COLUMNS
    if not name.endswith("_loss")
} | {
    "gradient_norm": (0, math.inf),  # it may overflow in float32 although every gradient is finite
    "update_norm": (0, math.inf),
    "update_cosine": (-1, 1),
    "kl_scale": (0, 1),
}


def append_record(path: Path, record: EpochRecord) -> None:
    """Append one row to metrics.csv and wait until it is on disk.

    A new file gets the header first. A torn last line is overwritten. A file with fewer columns is rewritten with all.

    Args:
        path: The metrics.csv file, whose directory exists.
        record: The epoch to append.

    Raises:
        RecordError: If the file exists and is not a metrics.csv.
        OSError: If it is a link, or cannot be written; at most a torn last line remains then.
    """
    content = read_regular(path) if path.exists() else b""
    size = _intact_size(path, content)
    if size and not content.startswith(_HEADER):
        rewrite_records(path, [*read_records(path), record])
        return
    with named_in_errors(path), open(path, "r+b" if content else "wb", opener=own_file) as file:
        file.seek(size)
        file.truncate()
        file.write((b"" if size else _HEADER) + _format(record))
        file.flush()
        os.fsync(file.fileno())


def read_records(path: Path) -> list[EpochRecord]:
    """Return the rows of metrics.csv, without a last line that a crash has torn.

    Args:
        path: The metrics.csv file.

    Returns:
        One record per complete row, in the order of the file.

    Raises:
        RecordError: If the file is missing or not a metrics.csv, or a line is malformed that is not a torn last one.
    """
    try:
        content = read_regular(path)
    except OSError as error:
        raise RecordError(f"Cannot read {path}: {error.strerror}.") from error
    header, *lines = content[: _intact_size(path, content)].removesuffix(b"\n").split(b"\n")
    num_columns = _HEADERS.get(header + b"\n", 0)
    return [_parse(path, number, line, num_columns) for number, line in enumerate(lines, start=2)]


def records_digest(records: Sequence[EpochRecord]) -> str:
    """Return the SHA-256 of rows. Checkpoints and run.json keep it, so that a changed row is noticed.

    Args:
        records: The rows, in order.
    """
    return hashlib.sha256(b"".join(map(_digested, records))).hexdigest()


def read_ended_records(path: Path, info: "RunInfo") -> list[EpochRecord]:
    """Return the rows of a run; if the run has ended, check them against the digest in run.json.

    Args:
        path: The metrics.csv file.
        info: Content of the run.json beside it.

    Raises:
        RecordError: If the file cannot be read, or was changed after the run's end.
    """
    records = read_records(path)
    if info.records_digest is not None and records_digest(records) != info.records_digest:
        raise RecordError(f"{path} is not as it was at the end of the run; restore it, or delete the run's directory.")
    return records


def best_epoch(records: Sequence[EpochRecord]) -> int:
    """Return the epoch with the lowest validation error, the first of equals; never 0, the untrained network.

    Args:
        records: The rows, in order, with at least one epoch after row 0.
    """
    return min(records[1:], key=lambda record: record.val_error).epoch


def rewrite_records(path: Path, records: list[EpochRecord]) -> None:
    """Replace metrics.csv by these rows, atomically: a crash leaves either the old file or the new one.

    Args:
        path: The metrics.csv file, whose directory exists.
        records: All rows that the file shall hold.

    Raises:
        OSError: If the file cannot be written; it is then as before.
    """
    write_atomically(path, _HEADER + b"".join(_format(record) for record in records))


def _format(record: EpochRecord, columns: Sequence[str] = COLUMNS) -> bytes:
    """Return the row of a record; ``repr`` gives the shortest text that reads back as the same float."""
    values = (repr(COLUMN_TYPES[name](getattr(record, name))) for name in columns)
    return (",".join(values) + "\n").encode("ascii")


def _digested(record: EpochRecord) -> bytes:
    """Return the part of a row that goes into a digest: without trailing columns that have their default.

    Only columns that were added after the first digests are left out, so that older digests stay valid. The number of
    values tells which columns are left.
    """
    count = len(COLUMNS)
    while count > _NUM_IN_OLDEST_DIGESTS and _is_default(COLUMNS[count - 1], getattr(record, COLUMNS[count - 1])):
        count -= 1
    return _format(record, COLUMNS[:count])


def _is_default(name: str, value: float) -> bool:
    return repr(COLUMN_TYPES[name](value)) == repr(_DEFAULTS[name])  # NaN is not equal to itself


def _parse(path: Path, number: int, line: bytes, num_columns: int) -> EpochRecord:
    """Return the record of one line, or say which line of which file is not one."""
    try:
        texts, kinds = line.decode("ascii").split(","), list(COLUMN_TYPES.values())[:num_columns]
        if re.search(r"[_\s]", line.decode("ascii")):  # Python reads them in a number, but no program writes them
            raise ValueError("a blank or an underscore")
        values = [kind(text) for kind, text in zip(kinds, texts, strict=True)]
    except ValueError as error:
        raise RecordError(
            f"{path}, line {number}: expected {num_columns} numbers separated by commas, got"
            f" {line.decode(errors='replace')!r}; restore the file, or remove the run and start it again."
        ) from error
    for index, (name, value) in enumerate(zip(COLUMN_TYPES, values, strict=False)):  # an older file has fewer columns
        if name in MAY_BE_UNMEASURED and math.isnan(value):
            values[index] = math.nan  # always the same object, so that equal rows compare as equal
        elif name in _BOUNDS and not _BOUNDS[name][0] <= value <= _BOUNDS[name][1]:
            least, largest = _BOUNDS[name]
            expected = "≥ 0 and finite" if largest == sys.float_info.max else f"in [{least}, {largest}]"
            raise RecordError(
                f"{path}, line {number}: {name} is {value!r}, expected a number {expected}; restore the file, or remove"
                " the run and start it again."
            )
    return EpochRecord(*values)  # type: ignore[arg-type]  # int and float in the order of the fields


def _intact_size(path: Path, content: bytes) -> int:
    """Return how many leading bytes are complete lines; zero for an empty file or a torn header."""
    num_columns = next((count for header, count in _HEADERS.items() if content.startswith(header)), None)
    if num_columns is None:
        if any(header.startswith(content) for header in _HEADERS):
            return 0
        raise RecordError(
            f"{path}, line 1: expected the header of metrics.csv, got {content[:60].splitlines()[0]!r};"
            " the file was not written by this version, so move it away."
        )
    end = content.rfind(b"\n") + 1
    if end < len(content):
        return end
    start = content.rfind(b"\n", 0, end - 1) + 1
    is_short = start > 0 and content[start:end].count(b",") < num_columns - 1
    return start if is_short else end
