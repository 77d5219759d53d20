"""Measurements small enough for tests."""

from collections.abc import Callable, Sequence

import pytest
import torch

from kfac_sua.bench import rates
from kfac_sua.bench.arithmetic import Arithmetic
from kfac_sua.bench.contender import Batch, Contender
from kfac_sua.bench.settings import compose_settings, parse_items
from kfac_sua.preconditioner import StepGraph

TINY = ("--model", "tiny", "--device", "cpu", "--batch-size", "8", "--rounds", "1", "--refresh-rounds", "1")


def shrink_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure the machine's rates on matrices that take no time."""
    monkeypatch.setattr(rates, "GEMM_SHAPES", ((16, 8, 32),))
    monkeypatch.setattr(rates, "CHOLESKY_WIDTHS", (16,))
    monkeypatch.setattr(rates, "LEAST_SECONDS", 0.0)


def tiny_contenders(
    *items: str,
    precision: str = "float32",
    batch_size: int = 8,
    overrides: Sequence[str] = (),
    new_graph: Callable[[], StepGraph | None] = lambda: None,
) -> dict[str, Contender]:
    """Return contenders on the tiny network, plain SGD first."""
    arithmetic = Arithmetic(precision, torch.device("cpu"))
    batch = Batch.random(batch_size, arithmetic)
    settings = compose_settings(
        parse_items(items), overrides, {"model": "tiny", "batch_size": batch_size, "device": "cpu"}
    )
    return {setting.name: Contender(setting.config, arithmetic, batch, new_graph()) for setting in settings}
