"""What operations cost on a device: by these rates forms are chosen, and where inverses are applied.

On a CPU counted FLOPs decide: every rate is the same, and nothing else costs anything. On a GPU the time per FLOP of
products, triangular solves and factorisations differs by factors of ten to a hundred, and launches take time too.
``python -m kfac_sua.bench.device_rates`` measures the rates of a device; :func:`use_rates` puts them in force. Other
rates change results by rounding errors only.
"""

import dataclasses
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

_LEAST = {"parallel": 1, "symmetric_width": 2, "product_inverse_width": 1}
"""Fields that are integers, and the least value of each."""


@dataclass(frozen=True)
class DeviceRates:
    """Rates of one device. All are > 0, except seconds per operation, which are ≥ 0.

    Args:
        source: What was measured, and how; shown by ``describe()``.
        product: FLOP/s of IEEE float32 matrix products.
        split_product: FLOP/s of the same products computed as three products of bfloat16 parts (see
            ``forms/split.py``); their FLOPs are counted once, not three times. 0 where the
            device has no units for bfloat16 that make it worth trying.
        cholesky: FLOP/s of factorising one matrix, d³/3 each.
        triangular: FLOP/s of triangular solves with a matrix on the right, d² per column.
        inverse: FLOP/s of factorising and inverting dense blocks, d³ each.
        memory: Bytes per second that elementwise operations read and write.
        kernel_s: Seconds that the device takes for the smallest operation.
        launch_s: Seconds that the host takes for an operation from Python, with the views around it.
        parallel: Tiles of products that the device computes at once. Products of many rows and few columns are split
            into as many.
        tile_row_s: Seconds that one tile of a narrow Gram matrix takes per row.
        symmetric_width: Width from which a Gram matrix is computed in three quarters of its FLOPs, by more operations.
        product_inverse_width: Width from which triangles are inverted by products of their blocks rather than by
            ``torch.cholesky_inverse``, for which PyTorch calls different libraries by release and size.
    """

    source: str
    product: float
    split_product: float
    cholesky: float
    triangular: float
    inverse: float
    memory: float
    kernel_s: float
    launch_s: float
    parallel: int
    tile_row_s: float
    symmetric_width: int
    product_inverse_width: int

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            may_be_zero = field.name in ("split_product", "kernel_s", "launch_s")
            if field.name == "source":
                if not isinstance(value, str):
                    raise ValueError(f"source must be a text, got {value!r}.")
            elif isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
                raise ValueError(f"{field.name} must be a number, got {value!r}.")
            elif value < 0 or (value == 0 and not may_be_zero):
                raise ValueError(f"{field.name} must be {'>=' if may_be_zero else '>'} 0, got {value!r}.")
            elif math.isinf(value) and field.name != "memory":
                raise ValueError(f"{field.name} must be finite, got {value!r}.")
            elif field.name in _LEAST and not (isinstance(value, int) and value >= _LEAST[field.name]):
                raise ValueError(f"{field.name} must be a whole number >= {_LEAST[field.name]}, got {value!r}.")

    @property
    def has_launches(self) -> bool:
        """Whether operations cost time beside their FLOPs, as on a GPU."""
        return self.launch_s > 0

    def write(self, path: Path) -> None:
        """Write the rates to a JSON file."""
        path.write_text(json.dumps(dataclasses.asdict(self), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path | str) -> "DeviceRates":
        """Read what :meth:`write` wrote.

        Raises:
            ValueError: If the file does not hold these rates; the message names it.
            OSError: If it cannot be read.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is not JSON: {error}.") from error
        names = [field.name for field in dataclasses.fields(cls)]
        if not isinstance(values, dict) or set(values) != set(names):
            raise ValueError(f"{path} must hold {', '.join(names)}, and nothing else.")
        try:
            return cls(**values)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


@dataclass(frozen=True)
class Flops:
    """Counted FLOPs by kind of operation; a multiply-add counts as two.

    Args:
        products: FLOPs of matrix products.
        factorisations: FLOPs of Cholesky factorisations, d³/3 each.
        solves: FLOPs of triangular solves, d² per column.
        inversions: FLOPs of factorising and inverting dense blocks, d³ each.
    """

    products: int = 0
    factorisations: int = 0
    solves: int = 0
    inversions: int = 0

    @property
    def total(self) -> int:
        """FLOPs of all kinds."""
        return self.products + self.factorisations + self.solves + self.inversions

    def seconds(self, rates: DeviceRates) -> float:
        """Return how long they take on a device, one after the other."""
        return (
            self.products / rates.product
            + self.factorisations / rates.cholesky
            + self.solves / rates.triangular
            + self.inversions / rates.inverse
        )


NEVER = 2**31
"""A width above that of every block, for choices that are never made."""

_COUNTED = 2.0**35
"""FLOP/s that turn counted FLOPs into seconds on a CPU: near the speed of a core, and a power of two, so that division
by it is exact."""

CPU = DeviceRates(
    source="counted FLOPs",
    product=_COUNTED,
    split_product=0.0,
    cholesky=_COUNTED,
    triangular=_COUNTED,
    inverse=_COUNTED,
    memory=math.inf,
    kernel_s=0.0,
    launch_s=0.0,
    parallel=1,  # measured: a Gram matrix of 100,000 rows and 32 columns takes a core twice as long in 4 to 64 chunks
    tile_row_s=1e-9,  # has no effect, as parallel is 1
    symmetric_width=256,  # measured: from here 24 to 30 % faster
    product_inverse_width=NEVER,  # measured: LAPACK's own inverse is faster at every width
)

CUDA = DeviceRates(
    source="one NVIDIA H200, torch 2.11, in part estimated: provisional",
    product=35e12,  # measured: 42 at 512×4608×4608, 29 at 1600×512×512
    split_product=120e12,  # estimated: 1.5 times as long as TF32, in which full K-FAC is applied in 0.46 ms
    cholesky=0.7e12,  # measured: nine of width 512 in 0.57 ms
    triangular=5e12,  # estimated
    inverse=8e12,  # measured: all of full K-FAC's in about 40 ms
    memory=2.5e12,  # estimated: half of what is on the data sheet
    kernel_s=2.5e-6,  # estimated: in a CUDA graph
    launch_s=2e-5,  # measured: an eager plain step takes 2.1 ms longer for 40 kernels and the views around them
    parallel=132,  # multiprocessors, of an H100 too
    tile_row_s=17e-9,  # measured: two of 102,400 rows and 32 columns take 1.76 ms, four of 25,600 rows 0.46 ms
    symmetric_width=4096,  # estimated: a quarter of such a product takes longer than three copies of its parts
    product_inverse_width=1,  # estimated: torch 2.11 takes MAGMA's batched inverse, which is slow
)
"""Provisional, as the comments on its values say. H100 and H200 differ in memory only."""

OWN_RATES = {"cpu": CPU, "cuda": CUDA}
"""The rates that come with this project, by type of device."""

_in_force = dict(OWN_RATES)


def rates_of(device: torch.device | str) -> DeviceRates:
    """Return the rates in force for a device; those of a CPU for a type of device that has none."""
    return _in_force.get(torch.device(device).type, CPU)


def use_rates(rates: DeviceRates, device_type: str = "cuda") -> None:
    """Put rates in force for all devices of a type; preconditioners use them from their next step on.

    Args:
        rates: The rates.
        device_type: ``cuda``, ``cpu`` or another type that PyTorch knows.

    Raises:
        TypeError: If they are not :class:`DeviceRates`, but perhaps the name of a file.
    """
    if not isinstance(rates, DeviceRates):
        raise TypeError(f"use_rates() takes DeviceRates, as DeviceRates.read(path) returns, got {rates!r}.")
    _in_force[torch.device(device_type).type] = rates


@contextmanager
def rates_in_force(rates: DeviceRates, device_type: str) -> Iterator[None]:
    """Put rates in force for devices of a type inside, and restore the former ones afterwards."""
    before = dict(_in_force)
    use_rates(rates, device_type)
    try:
        yield
    finally:
        _in_force.clear()
        _in_force.update(before)
