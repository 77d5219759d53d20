"""The record of a measurement: a JSON file with which a later measurement can be compared."""

import dataclasses
import json
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from kfac_sua.bench.costs import TimeCost
from kfac_sua.bench.layers import LayerWork, StepWork
from kfac_sua.bench.operations import Operations
from kfac_sua.bench.rates import Rate
from kfac_sua.files.atomic import write_atomically
from kfac_sua.files.openers import read_regular
from kfac_sua.runs.environment import Environment
from kfac_sua.runs.run_info import RecordError

FORMAT = 4
OLDER_FORMATS = (2, 3)
"""Formats that can still be read. 3 lacks operations; 2 also captured steps, and calls the precision ``dtype``."""


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What was measured, and how much of it.

    Args:
        model: Name of the network.
        width: Its width.
        batch_size: Images per mini-batch.
        period: Mini-batches between refreshes, in settings without one of their own.
        device: ``cpu`` or ``cuda``.
        precision: In what it computes: ``float32``, ``tf32``, ``bfloat16`` or ``float64``.
        num_threads: Threads that PyTorch uses on the CPU.
        overrides: Further keys of the configuration, as given.
        rounds: Plain steps per setting, or groups of them.
        refresh_rounds: Steps of each other kind per setting.
        repeats: Measurements of everything.
        steps_together: Plain steps between two waits for the device, at most; single ones on a CPU.
    """

    model: str
    width: float
    batch_size: int
    period: int
    device: str
    precision: str
    num_threads: int
    overrides: list[str]
    rounds: int
    refresh_rounds: int
    repeats: int
    steps_together: int


@dataclasses.dataclass(frozen=True)
class Memory:
    """Peak memory of a few steps, construction included.

    Args:
        peak_bytes: Most bytes held at once.
        ratio: ``peak_bytes`` over that of plain SGD.
    """

    peak_bytes: int
    ratio: float


@dataclasses.dataclass(frozen=True)
class Cost:
    """The costs of one setting.

    Args:
        setting: Its name.
        time: Of its steps.
        memory: At its peak.
        is_captured: Whether its plain steps were replays of a CUDA graph.
        why_eager: A clause on why they were not; empty if they were.
        operations: Kind of step to its operations; empty for ``compiled`` and where they were not counted.
    """

    setting: str
    time: TimeCost
    memory: Memory
    is_captured: bool
    why_eager: str
    operations: dict[str, Operations]


@dataclasses.dataclass(frozen=True)
class BenchRecord:
    """A whole measurement.

    Args:
        arguments: What was measured.
        environment: What it ran on.
        rates: What the machine can do.
        costs: One per setting, plain SGD first, and ``compiled`` last if asked for.
        steps: Work per kind of step; empty unless asked for.
        layers: Work per layer; empty unless asked for.
        why_not_compiled: Why plain SGD could not be compiled, in a clause; empty if it was, or was not asked for.
    """

    arguments: Arguments
    environment: Environment
    rates: list[Rate]
    costs: list[Cost]
    steps: list[StepWork]
    layers: list[LayerWork]
    why_not_compiled: str


def write_record(path: Path, record: BenchRecord) -> None:
    """Write a measurement as JSON.

    Raises:
        OSError: If the file cannot be written.
    """
    text = json.dumps({"format": FORMAT, **dataclasses.asdict(record)}, indent=2)
    write_atomically(path, (text + "\n").encode())


def read_record(path: Path) -> BenchRecord:
    """Return a measurement that an earlier call has written.

    Raises:
        RecordError: If the file is missing, is not JSON, or does not hold exactly what this version writes or
            the one before wrote.
    """
    try:
        content = json.loads(read_regular(path).decode())
    except OSError as error:
        raise RecordError(f"Cannot read {path}: {error.strerror}.") from error
    except ValueError as error:
        raise RecordError(f"{path} is not valid JSON ({error}); measure it again with --json.") from error
    found = content.get("format") if isinstance(content, dict) else None
    if found not in (*OLDER_FORMATS, FORMAT):
        raise RecordError(
            f"{path} has format {json.dumps(found)}, where this version reads {OLDER_FORMATS[0]} to {FORMAT}; measure "
            f"it again with --json."
        )
    del content["format"]
    _bring_up_to_date(content, found)
    try:
        return _decode(BenchRecord, content, "the file")
    except RecordError as error:
        raise RecordError(f"{path} was not written by this version: {error}") from error


def _bring_up_to_date(content: dict[str, Any], version: int) -> None:
    """Return the content of a file of an older format in the present format."""
    costs = content.get("costs")
    for cost in costs if isinstance(costs, list) and version < FORMAT else []:
        if isinstance(cost, dict):
            cost["operations"] = {}
    if version > OLDER_FORMATS[0]:
        return
    arguments = content.get("arguments")
    if isinstance(arguments, dict) and "dtype" in arguments:
        arguments["precision"] = arguments.pop("dtype")
        arguments["steps_together"] = 1
    content["why_not_compiled"] = ""
    for cost in costs if isinstance(costs, list) else []:
        if isinstance(cost, dict):
            cost |= {"is_captured": False, "why_eager": ""}


def _decode(hint: Any, value: Any, where: str) -> Any:
    """Return a value read from JSON as the type of an annotation, or raise with the place where it is another."""
    if dataclasses.is_dataclass(hint):
        return _decode_dataclass(hint, value, where)
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is list and isinstance(value, list):
        return [_decode(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value)]
    if origin is dict and isinstance(value, dict):
        return {key: _decode(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if origin is UnionType:  # one type or None
        return None if value is None else _decode(next(a for a in arguments if a is not NoneType), value, where)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if (hint is float and is_number) or (isinstance(hint, type) and type(value) is hint):
        return value
    raise RecordError(f"{where} must be {getattr(hint, '__name__', hint)}, got {json.dumps(value)[:60]}.")


def _decode_dataclass(kind: Any, value: Any, where: str) -> Any:
    hints = get_type_hints(kind)
    if not isinstance(value, dict) or value.keys() != hints.keys():
        got = ", ".join(sorted(hints.keys() ^ value.keys())) if isinstance(value, dict) else json.dumps(value)[:60]
        raise RecordError(f"{where} has missing or unknown fields ({got}).")
    return kind(**{name: _decode(hint, value[name], f"{where}.{name}") for name, hint in hints.items()})
