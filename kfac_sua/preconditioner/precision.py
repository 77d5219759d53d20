"""The precision that factors and inverses are kept in, whatever the model trains in."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor


def at_least_float32(values: Tensor) -> Tensor:
    """Return the tensor in the precision that factors and inverses are kept in: float32, or float64 if it is that."""
    return values.to(_kept_dtype(values.dtype))


def fits(kept: Tensor, weight: Tensor) -> bool:
    """Whether what is kept for a weight is on its device, and in the precision that goes with it."""
    return kept.dtype == _kept_dtype(weight.dtype) and kept.device == weight.device


def _kept_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


@contextmanager
def factor_precision() -> Iterator[None]:
    """Keep autocast, if it is on, away from factors and inverses."""
    with ExitStack() as stack:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield
