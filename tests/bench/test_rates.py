"""Machine rates are FLOPs over seconds."""

import itertools

import pytest
import torch
from bench_runs import shrink_rates

from kfac_sua.bench import rates
from kfac_sua.bench.progress import Announcer


def test_rates_by_a_clock_that_ticks_once_per_reading(monkeypatch):
    """Every call then takes a second, so that a rate is the FLOPs of one call."""
    shrink_rates(monkeypatch)
    ticks = itertools.count()
    monkeypatch.setattr(rates, "seconds_now", lambda device: float(next(ticks)))
    found = rates.measure_rates(torch.device("cpu"), torch.bfloat16, torch.float32, Announcer())
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
    assert rates.best_gemm_rate(found, torch.float32) == 7e9
