"""The table scaling.csv: a row per sweep, case and cost, which later calls and the figure read back.

A case that lies on several sweeps is measured once and has rows in each. What it was measured on stands in every row;
a file holds measurements of one machine and one set of versions only.
"""

import dataclasses
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from kfac_sua.bench.scaling.cases import COSTS, SWEEPS, Case, Layer
from kfac_sua.bench.scaling.measure import Measurement, Seconds
from kfac_sua.config import PreconditionerName
from kfac_sua.files.atomic import write_atomically
from kfac_sua.files.openers import read_regular
from kfac_sua.preconditioner.settings import InverseMethod

# Types as pandas reads and writes them; those with a capital letter may be empty.
COLUMN_TYPES = {
    "sweep": "str",
    "size": "int64",
    "channels": "int64",
    "kernel_size": "int64",
    "batch_size": "int64",
    "method": "str",
    "group_size": "Int64",
    "inverse_method": "str",
    "is_low_rank": "bool",
    "cost": "str",
    "seconds": "float64",
    "seconds_low": "float64",
    "seconds_high": "float64",
    "repeats": "int64",
    "dense_flops": "int64",
    "note": "str",
    "device": "str",
    "device_name": "str",
    "num_threads": "int64",
    "torch": "str",
    "kfac_sua": "str",
    "commit": "str",
}
_FLOATS = [name for name, kind in COLUMN_TYPES.items() if kind == "float64"]


class ScalingError(Exception):
    """A table that cannot be used; the message is one sentence."""


@dataclasses.dataclass(frozen=True)
class Machine:
    """Conditions on which seconds depend beside the case.

    Args:
        device: ``cpu`` or ``cuda``.
        device_name: Name of the processor or the GPU.
        num_threads: Threads of PyTorch on the CPU.
        torch: Version of PyTorch.
        kfac_sua: Version of this package.
    """

    device: str
    device_name: str
    num_threads: int
    torch: str
    kfac_sua: str


def to_frame(measurements: Mapping[Case, Measurement], machine: Machine) -> pd.DataFrame:
    """Return the table of all measurements.

    Args:
        measurements: By case, measured or not.
        machine: What they were measured on.

    Returns:
        The columns of ``COLUMN_TYPES``, ordered by sweep and size.
    """
    rows = [
        {"sweep": sweep.name, "size": size} | row
        for sweep in SWEEPS
        for size, case in _on_sweep(sweep.size_of, measurements)
        for row in _rows(case, measurements[case], machine)
    ]
    return pd.DataFrame(rows, columns=list(COLUMN_TYPES)).astype(COLUMN_TYPES)


def write_table(path: Path, frame: pd.DataFrame) -> None:
    """Write scaling.csv so that an interruption leaves either the old or the new one.

    Args:
        path: The file, whose directory exists.
        frame: Result of :func:`to_frame`.
    """
    write_atomically(path, frame.to_csv(index=False).encode())


def read_table(path: Path) -> pd.DataFrame:
    """Return the table of an earlier call, bit-equal to the one written.

    Args:
        path: The file.

    Raises:
        ScalingError: If it is not such a table.
        OSError: If it cannot be read.
    """
    try:
        # Floats as text first: not every version of pandas reads back the number that was written.
        types = COLUMN_TYPES | dict.fromkeys(_FLOATS, "str")
        frame = pd.read_csv(
            io.BytesIO(read_regular(path)), dtype=types, keep_default_na=False, na_values={"group_size": [""]}
        )
        if list(frame.columns) != list(COLUMN_TYPES):
            raise ValueError("other columns")
        return frame.assign(**{name: frame[name].replace("", "nan").astype("float64") for name in _FLOATS})
    except (ValueError, TypeError) as error:  # pandas' own errors are ValueErrors
        raise ScalingError(
            f"{path} is not a table that this version wrote ({' '.join(str(error).split())}); move it away or give"
            " another --out."
        ) from error


def from_frame(frame: pd.DataFrame, path: Path, machine: Machine) -> dict[Case, Measurement]:
    """Return the measurements of a table.

    Args:
        frame: Result of :func:`read_table`.
        path: Where it is from, for messages.
        machine: What the coming cases are measured on.

    Raises:
        ScalingError: If the table was measured on something else, or a case lacks a cost.
    """
    measurements = {}
    keys = ["channels", "kernel_size", "batch_size", "method", "group_size", "inverse_method"]
    for _, rows in frame.groupby(["sweep", *keys], sort=False, dropna=False):
        first = rows.iloc[0]
        _check_machine(first, path, machine)
        size = None if pd.isna(first["group_size"]) else int(first["group_size"])
        layer = Layer(int(first["channels"]), int(first["kernel_size"]), int(first["batch_size"]))
        case = Case(layer, PreconditionerName(first["method"]), size, InverseMethod(first["inverse_method"]))
        measurements[case] = _measurement(rows, path, case)
    return measurements


def _on_sweep(size_of: Any, measurements: Mapping[Case, Measurement]) -> list[tuple[int, Case]]:
    """Return sizes and cases on a sweep, ordered by size and then as they were measured."""
    placed = [(size, case) for case in measurements if (size := size_of(case)) is not None]
    return sorted(placed, key=lambda pair: pair[0])


def _rows(case: Case, measurement: Measurement, machine: Machine) -> list[dict[str, Any]]:
    shared = dataclasses.asdict(case.layer) | {
        "method": case.method.value,
        "group_size": case.group_size,
        "inverse_method": case.inverse_method.value,
        "is_low_rank": measurement.is_low_rank,
        "repeats": measurement.repeats,
        "note": measurement.note,
        "commit": measurement.commit,
    }
    nothing = Seconds(float("nan"), float("nan"), float("nan"))
    rows = []
    for cost in COSTS:
        seconds = measurement.seconds.get(cost, nothing)
        spread = {"seconds": seconds.median, "seconds_low": seconds.low, "seconds_high": seconds.high}
        flops = case.dense_flops(cost)
        rows.append(shared | {"cost": cost, "dense_flops": flops} | spread | dataclasses.asdict(machine))
    return rows


def _check_machine(row: "pd.Series[Any]", path: Path, machine: Machine) -> None:
    for name, here in dataclasses.asdict(machine).items():
        if row[name] != here:
            raise ScalingError(
                f"{path} was measured with {name} {row[name]}, here it is {here}; give another --out, or remove the"
                " file to measure everything anew."
            )


def _measurement(rows: pd.DataFrame, path: Path, case: Case) -> Measurement:
    if rows["cost"].tolist() != list(COSTS):
        raise ScalingError(f"{path} lacks costs of {case.method} at {case.layer}; move it away or give another --out.")
    first = rows.iloc[0]
    columns = rows[_FLOATS].to_numpy(dtype=float)
    spreads = {cost: Seconds(*map(float, values)) for cost, values in zip(COSTS, columns, strict=True)}
    return Measurement(
        {} if first["note"] else spreads,
        repeats=int(first["repeats"]),
        is_low_rank=bool(first["is_low_rank"]),
        commit=first["commit"],
        note=first["note"],
    )
