"""Machine rates are FLOPs over seconds."""

import itertools

import pytest
import torch
from bench_runs import shrink_rates

from kfac_sua.bench import rates
from kfac_sua.bench.arithmetic import Arithmetic
from kfac_sua.bench.progress import Announcer


def test_rates_by_a_clock_that_ticks_once_per_reading(monkeypatch):
    """Every call then takes a second, so that a rate is the FLOPs of one call."""
    shrink_rates(monkeypatch)
    ticks = itertools.count()
    monkeypatch.setattr(rates, "seconds_now", lambda device: float(next(ticks)))
    found = rates.measure_rates(Arithmetic("bfloat16", torch.device("cpu")), Announcer())
    product, inverse = 2 * 16 * 8 * 32 / 1e9, 16**3 / 1e9
    assert [(rate.operation, rate.dtype, rate.shape, rate.gflop_per_s) for rate in found] == [
        ("gemm", "bfloat16", [16, 8, 32], pytest.approx(product)),
        ("gemm", "float32", [16, 8, 32], pytest.approx(product)),
        ("cholesky_inverse", "float32", [16], pytest.approx(inverse)),
    ]


def test_best_rate_is_that_of_the_number_format():
    """The floor of a part of a step comes from the fastest product in its own number format."""
    found = [
        rates.Rate("gemm", "float32", [1, 1, 1], 5.0),
        rates.Rate("gemm", "float32", [2, 2, 2], 7.0),
        rates.Rate("gemm", "bfloat16", [2, 2, 2], 20.0),
        rates.Rate("cholesky_inverse", "float32", [2], 99.0),
    ]
    assert rates.best_gemm_rate(found, "float32") == 7e9


@pytest.mark.parametrize(
    ("name", "device", "formats"),
    [
        ("float32", "cuda", ["float32", "float32", "float32"]),
        ("tf32", "cuda", ["tf32", "float32", "bf16x3"]),
        ("bfloat16", "cuda", ["bfloat16", "float32", "bf16x3"]),
        ("bfloat16", "cpu", ["bfloat16", "float32", "float32"]),
        ("float64", "cuda", ["float64", "float64", "float64"]),
    ],
)
def test_parts_of_a_step_have_formats_of_their_own(name, device, formats):
    """Factors and inverses are made in IEEE arithmetic; their application and the network are not bound to it."""
    arithmetic = Arithmetic(name, torch.device(device))
    assert [arithmetic.format_of(phase) for phase in ("forward_backward", "inversion", "application")] == formats
    assert arithmetic.format_of("statistics") == arithmetic.format_of("inversion")
