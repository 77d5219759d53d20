"""What a run leaves as text: metrics.csv, one row per epoch, and run.json, what it was and how it ended.

Both survive a crash at any moment: rows are appended and synchronised one at a time, so that at most the last
one is torn, and everything else is written to a temporary file and renamed.
"""

import dataclasses
import errno
import hashlib
import json
import math
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from kfac_sua.runs.atomic import named_in_errors, write_atomically
from kfac_sua.runs.openers import cannot_use, own_file, read_regular

Status = Literal["running", "finished", "diverged", "failed"]
# Of these nothing is left to do; a run of any other status goes on by the same command.
ENDED: tuple[Status, ...] = ("finished", "diverged")
UNENDED: tuple[Status, ...] = ("running", "failed")


class RecordError(Exception):
    """A record that cannot be read or written; the message is one sentence naming the file."""


@dataclasses.dataclass(frozen=True)
class EpochRecord:
    """One row of metrics.csv.

    Errors are fractions in [0, 1], losses nats, and times seconds accumulated since the run's start. ``train_loss``
    and ``train_error`` are means over the epoch's mini-batches, each before its own step; in row 0, the untrained
    network, they are those of evaluation mode on the fixed training subset, as ``train_eval_loss`` is everywhere.

    ``train_time_s`` is the wall time from each epoch's request for its first mini-batch to the end of its last step:
    the sum of the five columns after it, of ``data_s`` (mini-batches being made), of ``other_s`` (metrics, progress
    and the loop itself) and of ``captured_s`` (captured steps, which a device carries out as a whole).
    ``evaluation_s`` and ``writing_s`` lie outside of it; the latter, of records and checkpoints, is what it took up to
    this row. These five are zero in files of before they were measured, where ``forward_backward_s`` includes
    ``data_s``.

    The rest is for diagnosis (``training/diagnostics.py``): ``current_damping`` is that of the next refresh, NaN for
    the baseline; the next four are means over the steps of the epoch that are looked at, NaN if there were none, and
    ``kl_scale`` without ``kl_clip``. The last three count since the run's start. Files of before have NaN and zero.
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
# Header -> number of columns, of all files that can be read: those of today, and three with fewer of the last columns.
_HEADERS = {_header(COLUMNS[:count]): count for count in (len(COLUMNS), *(len(COLUMNS) - few for few in (8, 9, 13)))}
_NUM_IN_OLDEST_DIGESTS = COLUMNS.index("captured_s")
_DEFAULTS = {field.name: field.default for field in dataclasses.fields(EpochRecord)}

MAY_BE_UNMEASURED = ("current_damping", "gradient_norm", "update_norm", "update_cosine", "kl_scale")
"""Columns that are NaN where there is nothing to measure."""

# Least and largest value of each column, but for losses, which may be anything, NaN included.
_BOUNDS = {
    name: (0, 1) if name.endswith("_error") else (0, sys.float_info.max)
    for name in COLUMNS
    if not name.endswith("_loss")
} | {
    "gradient_norm": (0, math.inf),  # of finite numbers, too, it overflows in float32
    "update_norm": (0, math.inf),
    "update_cosine": (-1, 1),
    "kl_scale": (0, 1),
}


def append_record(path: Path, record: EpochRecord) -> None:
    """Append one row to metrics.csv and wait until it is on disk.

    The header is written when the file is new; a torn last line is overwritten, and a file with fewer columns
    rewritten with all.

    Args:
        path: The metrics.csv file, whose directory exists.
        record: The epoch to append.

    Raises:
        RecordError: If the file exists and is not a metrics.csv.
        OSError: If it cannot be written, of which at most a torn last line remains, or is a link.
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
        RecordError: If the file is missing or not a metrics.csv, or a line but a torn last one is malformed.
    """
    try:
        content = read_regular(path)
    except OSError as error:
        raise RecordError(f"Cannot read {path}: {error.strerror}.") from error
    header, *lines = content[: _intact_size(path, content)].removesuffix(b"\n").split(b"\n")
    num_columns = _HEADERS.get(header + b"\n", 0)
    return [_parse(path, number, line, num_columns) for number, line in enumerate(lines, start=2)]


def records_digest(records: Sequence[EpochRecord]) -> str:
    """Return the SHA-256 of rows: what is kept elsewhere to see that none of them has been changed.

    Args:
        records: The rows, in order.
    """
    return hashlib.sha256(b"".join(map(_digested, records))).hexdigest()


def read_ended_records(path: Path, info: "RunInfo") -> list[EpochRecord]:
    """Return the rows of a run, which must be those that run.json speaks of if the run has ended.

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
    """Return the epoch with the lowest validation error, the first of equals; the untrained network is none.

    Args:
        records: The rows, in order, of one epoch at least.
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
    """Return what of a record a digest is made of.

    Of the columns that came after the first digests, those at the end that all have their defaults are no part of it:
    so digests of before hold, and the number of values tells which columns they are.
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
        if re.search(r"[_\s]", line.decode("ascii")):  # which Python takes in a number, and no program writes
            raise ValueError("a blank or an underscore")
        values = [kind(text) for kind, text in zip(kinds, texts, strict=True)]
    except ValueError as error:
        raise RecordError(
            f"{path}, line {number}: expected {num_columns} numbers separated by commas, got"
            f" {line.decode(errors='replace')!r}; restore the file, or remove the run and start it again."
        ) from error
    for index, (name, value) in enumerate(zip(COLUMN_TYPES, values, strict=False)):  # a file of before has fewer
        if name in MAY_BE_UNMEASURED and math.isnan(value):
            values[index] = math.nan  # one and the same, so that rows with it can be compared
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


# What else to say of runs on CUDA of before ``precision`` held for convolutions and products alike.
_PRECISIONS_OF_BEFORE = {"float32": "convolutions in TF32", "bfloat16": "of the network alone"}


# Numbers of run.json that have bounds.
_RANGES: dict[str, tuple[int, float]] = {
    "num_threads": (1, math.inf),
    "test_error": (0, 1),
    "diverged_at_epoch": (1, math.inf),
    "skipped_steps": (0, math.inf),
    "process_counts": (1, math.inf),
}


@dataclasses.dataclass
class RunInfo:
    """Content of run.json: what the run was, where it ran and how it ended.

    Attributes:
        status: ``running`` until the end; ``diverged`` after a non-finite loss; ``failed`` if the last attempt ended
            with an error, after which the same command tries again.
        config: The resolved configuration, as plain dictionaries.
        fingerprint: Digest of the configuration without the seed: runs that differ only in the seed share it.
        seed: Seed of the run.
        commit: Commit of the source, with ``+dirty`` for uncommitted changes; None outside a git checkout.
        versions: Version per package; None for a package that is not installed.
        device: ``cpu`` or ``cuda``.
        device_name: Name of the processor or the GPU.
        num_threads: Threads that PyTorch uses on the CPU.
        started: Start of the first attempt, ISO 8601 with time zone.
        ended: End of the run, ISO 8601 with time zone.
        test_loss: Loss on the test set in nats, measured once, at the end.
        test_error: Misclassification rate on the test set in [0, 1], measured once, at the end.
        diverged_at_epoch: Epoch of the first non-finite loss.
        failure: Why the last attempt failed, in one sentence.
        skipped_steps: Mini-batches that took no step, as something in them was not finite.
        records_digest: Of a run that has ended, what :func:`records_digest` returned for its rows.
        process_counts: How many processes its seconds come from; several numbers if it was resumed by others.
        machines: Every machine that its seconds come from, as ``host (device)``; several if it was resumed elsewhere.
        command: The command line of the first attempt, of a whole sweep where it is one of its runs; None where it was
            not started by a command, or before this was recorded.
        overrides: What that command line says of this run alone, as ``key=value``.
        source: Of a run that was trained on from another one, what tells the end of that one from all others.
    """

    status: Status
    config: dict[str, Any]
    fingerprint: str
    seed: int
    commit: str | None
    versions: dict[str, str | None]
    device: str
    device_name: str
    num_threads: int
    started: str
    ended: str | None = None
    test_loss: float | None = None
    test_error: float | None = None
    diverged_at_epoch: int | None = None
    failure: str | None = None
    skipped_steps: int = 0
    records_digest: str | None = None
    process_counts: list[int] = dataclasses.field(default_factory=lambda: [1])
    machines: list[str] = dataclasses.field(default_factory=list)
    command: str | None = None
    overrides: list[str] = dataclasses.field(default_factory=list)
    source: str | None = None

    @property
    def end(self) -> str:
        """What tells the end of this run from that of all others, wherever its directory lies."""
        return f"{self.fingerprint}, seed {self.seed}, {self.records_digest}"

    def __post_init__(self) -> None:
        """Check the type of every field, and of numbers the range, since run.json may come from elsewhere.

        Raises:
            RecordError: If a field has a value of another type, or one that no run comes to.
        """
        for name, hint in get_type_hints(type(self)).items():
            value = getattr(self, name)
            if not _matches(value, hint):
                wanted = hint.__name__ if isinstance(hint, type) else str(hint).removeprefix("typing.")
                raise RecordError(f"{name} must be {wanted}, got {value!r}.")
        for name, (least, largest) in _RANGES.items():
            values = getattr(self, name)
            for value in values if isinstance(values, list) else [values]:
                if value is not None and not least <= value <= largest:
                    raise RecordError(f"{name} must be in [{least}, {largest}], got {value!r}.")

    @property
    def precision(self) -> str:
        """In what convolutions and matrix products computed: seconds can be compared where this is the same.

        The key ``precision`` came to hold for both at once together with the key ``capture``. Before, on CUDA, float32
        left TF32 to convolutions, and bfloat16 was the network's alone; on a CPU it is what it was.
        """
        name = str(self.config.get("precision", "float32"))
        if self.device == "cuda" and "capture" not in self.config:
            return f"{name} ({_PRECISIONS_OF_BEFORE.get(name, 'as it was meant before')})"
        return name


def failure_reason(error: BaseException) -> str:
    """Return why an attempt failed, in one sentence.

    Args:
        error: What was raised.

    Returns:
        What this package says itself as it says it; the file and the reason of what the system refuses; how much
        memory was missing; and of anything else its type and text, on one line.
    """
    text = " ".join(str(error).split()) or "no details"
    if _is_out_of_memory(error, text):
        wanted = re.search(r"(?:[Tt]ried|[Uu]nable) to allocate ([\d.]+ \w+)", text)
        return f"Out of memory{f' (asked for {wanted[1]})' if wanted else ''}; lower batch_size or model.width."
    if isinstance(error, OSError):
        return cannot_use(error)
    return text if type(error).__module__.startswith("kfac_sua.") else f"{type(error).__name__}: {text}"


def _is_out_of_memory(error: BaseException, text: str) -> bool:
    """Say so of NumPy, of PyTorch on either device and its libraries, and of the system itself."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    said = ("out of memory", "can't allocate memory", "_STATUS_ALLOC_FAILED")
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(one in text for one in said))


def write_run_info(path: Path, info: RunInfo) -> None:
    """Write run.json atomically.

    Args:
        path: The run.json file, whose directory exists.
        info: What to write; its ``config`` must hold plain JSON types.

    Raises:
        RecordError: If the configuration holds something that JSON cannot.
        OSError: If the file cannot be written; it is then as before.
    """
    try:
        values = dataclasses.asdict(info)
        text = json.dumps(values | {"digest": _digest(values)}, indent=2)
    except TypeError as error:
        raise RecordError(f"Cannot write {path}: {error}; resolve the configuration to plain types first.") from error
    write_atomically(path, (text + "\n").encode())


def read_run_info(path: Path) -> RunInfo:
    """Return the content of run.json.

    Args:
        path: The run.json file.

    Returns:
        The content, with every field checked.

    Raises:
        RecordError: If the file is missing or not JSON, does not hold exactly the fields of ``RunInfo``, or was changed
            after it was written.
    """
    try:
        content = json.loads(read_regular(path).decode())
    except OSError as error:
        raise RecordError(f"Cannot read {path}: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise RecordError(
            f"{path} is not valid JSON ({error}); delete the run's directory and run it again."
        ) from error
    names = {field.name for field in dataclasses.fields(RunInfo)}
    if isinstance(content, dict):
        digest = content.pop("digest", None)  # files of before these were recorded lack them
        if digest is not None and digest != _digest(content):
            raise RecordError(f"{path} is not as it was written; restore it, or delete the run's directory.")
        if "finished" in content:  # as the time of a run's end was called, of diverged ones too
            content["ended"] = content.pop("finished")
        content = {
            "failure": None,
            "skipped_steps": 0,
            "records_digest": None,
            "process_counts": [1],
            "machines": [],
            "command": None,
            "overrides": [],
            "source": None,
        } | content
    if not isinstance(content, dict) or content.keys() != names:
        got = ", ".join(sorted(names ^ content.keys())) if isinstance(content, dict) else type(content).__name__
        raise RecordError(f"{path} was not written by this version: missing or unknown fields ({got}); move it away.")
    try:
        return RunInfo(**content)
    except RecordError as error:
        raise RecordError(f"{path}: {error}") from error


def _digest(values: dict[str, Any]) -> str:
    canonical = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _matches(value: object, hint: Any) -> bool:
    """Say whether a value read from JSON fits the annotation of a field."""
    origin = get_origin(hint)
    if isinstance(value, bool):
        return hint is Any  # to Python a bool is an int
    if origin is Literal:
        return value in get_args(hint)
    if origin is UnionType:
        return any(_matches(value, option) for option in get_args(hint))
    if hint is float:
        return isinstance(value, int | float)
    if origin is list:
        return isinstance(value, list) and all(_matches(item, get_args(hint)[0]) for item in value)
    return isinstance(value, origin or hint)
