"""run.json: what a run was, where it ran and how it ended. It is replaced as a whole, so a crash leaves the old one."""

import dataclasses
import errno
import hashlib
import json
import math
import re
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from kfac_sua.files.atomic import write_atomically
from kfac_sua.files.openers import cannot_use, read_regular

Status = Literal["running", "finished", "diverged", "failed"]
# A run with one of these is over; with any other status the same command goes on with it.
ENDED: tuple[Status, ...] = ("finished", "diverged")
UNENDED: tuple[Status, ...] = ("running", "failed")


class RecordError(Exception):
    """A record that cannot be read or written; the message is one sentence naming the file."""


# Older runs on CUDA, in which convolutions and products differed: what to add to the name of their precision.
_OLD_CUDA_PRECISIONS = {"float32": "convolutions in TF32", "bfloat16": "of the network alone"}

# Field of run.json -> its least and largest value.
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
        fingerprint: Digest of the configuration without the seed; runs that differ only in the seed share it.
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
        records_digest: Digest of its rows (``metrics.records_digest``); None until the run has ended.
        process_counts: Numbers of processes that trained it; several if it was resumed with another number.
        machines: Machines that trained it, as ``host (device)``; several if it was resumed elsewhere.
        command: The command line of the first attempt; for a run of a sweep, that of the whole sweep. None if no
            command started the run, or in older files.
        overrides: The overrides of this run on that command line, as ``key=value``.
        source: The :attr:`end` of the run that this one was trained on from (``start_from``); None if from none.
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
        """A text that identifies the final state of this run, wherever its directory lies."""
        return f"{self.fingerprint}, seed {self.seed}, {self.records_digest}"

    def __post_init__(self) -> None:
        """Check the type of every field and the range of numbers, since run.json may come from elsewhere.

        Raises:
            RecordError: If a field has a value of another type, or a number that is out of range.
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
        """The precision of convolutions and matrix products; seconds can be compared where it is the same.

        In configurations without the key ``capture``, which are older, ``precision`` did not hold for both on CUDA:
        float32 left convolutions in TF32, and bfloat16 was used by the network alone. On a CPU nothing has changed.
        """
        name = str(self.config.get("precision", "float32"))
        if self.device == "cuda" and "capture" not in self.config:
            return f"{name} ({_OLD_CUDA_PRECISIONS.get(name, 'as it was meant before')})"
        return name


def failure_reason(error: BaseException) -> str:
    """Return why an attempt failed, in one sentence.

    Args:
        error: What was raised.

    Returns:
        For an error of this package its message; for an error of the system the file and the reason; for a lack of
        memory how much was asked for; for any other error its type and message, on one line.
    """
    text = " ".join(str(error).split()) or "no details"
    if _is_out_of_memory(error, text):
        wanted = re.search(r"(?:[Tt]ried|[Uu]nable) to allocate ([\d.]+ \w+)", text)
        return f"Out of memory{f' (asked for {wanted[1]})' if wanted else ''}; lower batch_size or model.width."
    if isinstance(error, OSError):
        return cannot_use(error)
    return text if type(error).__module__.startswith("kfac_sua.") else f"{type(error).__name__}: {text}"


def _is_out_of_memory(error: BaseException, text: str) -> bool:
    """Whether memory ran out, as NumPy, PyTorch (on a CPU or a GPU), its libraries or the system say it."""
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
        digest = content.pop("digest", None)  # older files have none
        if digest is not None and digest != _digest(content):
            raise RecordError(f"{path} is not as it was written; restore it, or delete the run's directory.")
        if "finished" in content:  # the name of ``ended`` in older files
            content["ended"] = content.pop("finished")
        content = {  # older files lack these
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
    """Whether a value read from JSON fits the annotation of a field."""
    origin = get_origin(hint)
    if isinstance(value, bool):
        return hint is Any  # isinstance(True, int) is true, but no field is a bool
    if origin is Literal:
        return value in get_args(hint)
    if origin is UnionType:
        return any(_matches(value, option) for option in get_args(hint))
    if hint is float:
        return isinstance(value, int | float)
    if origin is list:
        return isinstance(value, list) and all(_matches(item, get_args(hint)[0]) for item in value)
    return isinstance(value, origin or hint)
