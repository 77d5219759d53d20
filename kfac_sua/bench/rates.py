"""Rates of the machine in matrix products and Cholesky inverses, against which all other times are judged."""

import dataclasses
import math
import statistics
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kfac_sua.bench.arithmetic import BF16X3, Arithmetic
from kfac_sua.bench.clock import seconds_now
from kfac_sua.bench.contender import PHASES
from kfac_sua.bench.progress import Announcer
from kfac_sua.config import Precision
from kfac_sua.preconditioner.forms.split import SplitInverse, matrix_parts
from kfac_sua.training.precision import computing_in

GEMM_SHAPES = ((512, 4608, 4608), (1600, 512, 512))
"""``[m, k] @ [k, n]``: a K-FAC activation inverse applied in VGG11, and a convolution's locations times channels."""
CHOLESKY_WIDTHS = (1024, 2304)
DTYPES = {"float32": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
LEAST_SECONDS = 0.05
"""Least seconds of a measurement. Shorter calls are repeated, so that clock and launch matter little."""
_CALLS = 5  # measurements per rate, of which the median counts


@dataclasses.dataclass(frozen=True)
class Rate:
    """A measured rate.

    Args:
        operation: ``gemm`` (2 m k n FLOPs) or ``cholesky_inverse`` (factorisation and inverse, n³ FLOPs).
        dtype: Number format: that of PyTorch, ``tf32`` or ``bf16x3``.
        shape: ``[m, k, n]`` or ``[n]``.
        gflop_per_s: 10⁹ FLOPs per second of the clock of ``clock.py``.
    """

    operation: str
    dtype: str
    shape: list[int]
    gflop_per_s: float


def measure_rates(arithmetic: Arithmetic, announcer: Announcer) -> list[Rate]:
    """Measure the rates that bound a step from below.

    Args:
        arithmetic: The number formats, and where to compute.
        announcer: Told of every rate.

    Returns:
        The rates of matrix products in every number format of a step, then those of Cholesky inverses.
    """
    device, of_factors = arithmetic.device, arithmetic.format_of("inversion")
    rates = []
    for kind in dict.fromkeys(map(arithmetic.format_of, PHASES)):
        for shape in GEMM_SHAPES:
            announcer.show("machine rates", f"gemm {shape}")
            in_parts = kind == BF16X3
            work = gemm_in_parts(shape, device) if in_parts else gemm(shape, DTYPES[kind], device)
            flops = (3 if in_parts else 1) * 2 * math.prod(shape)
            with computing_in(Precision.tf32 if kind == "tf32" else Precision.float32, device):
                rates.append(_rate("gemm", kind, shape, work, flops, device))
    for width in CHOLESKY_WIDTHS:
        announcer.show("machine rates", f"Cholesky inverse of width {width}")
        work = _cholesky_inverse(width, DTYPES[of_factors], device)
        with computing_in(Precision.float32, device):
            rates.append(_rate("cholesky_inverse", of_factors, (width,), work, width**3, device))
    return rates


def best_gemm_rate(rates: Sequence[Rate], dtype: str) -> float:
    """Return the fastest measured rate of matrix products in a number format, in FLOPs per second."""
    return 1e9 * max(rate.gflop_per_s for rate in rates if rate.operation == "gemm" and rate.dtype == dtype)


def _rate(
    operation: str,
    dtype: str,
    shape: Sequence[int],
    work: Callable[[], object],
    flops: int,
    device: torch.device,
) -> Rate:
    seconds = statistics.median(seconds_per_call(work, device, _CALLS))
    return Rate(operation, dtype, list(shape), flops / seconds / 1e9)


def seconds_per_call(work: Callable[[], object], device: torch.device, calls: int) -> list[float]:
    """Measure a piece of work several times after a warm-up, each time long enough for the clock.

    Args:
        work: The work.
        device: Where it is done.
        calls: Measurements.
    """
    work()  # prepares libraries and their memory
    once = _seconds(work, device, 1)
    repetitions = max(1, math.ceil(LEAST_SECONDS / max(once, 1e-6)))
    return [_seconds(work, device, repetitions) / repetitions for _ in range(calls)]


def _seconds(work: Callable[[], object], device: torch.device, repetitions: int) -> float:
    started = seconds_now(device)
    for _ in range(repetitions):
        work()
    return seconds_now(device) - started


def gemm(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Callable[[], object]:
    """Return a product ``[m, k] @ [k, n]`` of random matrices, to be carried out."""
    m, k, n = shape
    left, right = random_numbers(m, k, dtype=dtype, device=device), random_numbers(k, n, dtype=dtype, device=device)
    return lambda: left @ right


def gemm_in_parts(shape: Sequence[int], device: torch.device) -> Callable[[], object]:
    """Return the same in products of bfloat16 parts; a call splits its left factor, the right one is split before."""
    m, k, n = shape
    left = random_numbers(1, m, k, device=device)
    inverse = SplitInverse(matrix_parts(random_numbers(1, n, k, device=device)))  # as a symmetric one: transposed
    return lambda: inverse.right(left)


def _cholesky_inverse(width: int, dtype: torch.dtype, device: torch.device) -> Callable[[], object]:
    rows = random_numbers(width, width, dtype=dtype, device=device)
    matrix = rows @ rows.mT / width + torch.eye(width, dtype=dtype, device=device)
    return lambda: torch.cholesky_inverse(torch.linalg.cholesky_ex(matrix)[0])


def random_numbers(*shape: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """Draw random numbers: a GPU needs less power to multiply equal numbers, and so is faster than in training."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)
