"""The same bits every time: seeds for all runs, and deterministic kernels for runs that ask for them."""

import contextlib
import os
import random
from collections.abc import Iterator

import numpy as np
import torch
import torch.utils.deterministic

from kfac_sua.config import ConfigError

CUBLAS_VARIABLE = "CUBLAS_WORKSPACE_CONFIG"
CUBLAS_VALUES = (":4096:8", ":16:8")
"""The values with which NVIDIA guarantees deterministic results; cuBLAS reads the variable at its first use."""


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and PyTorch on all devices, once per run and before the model is made.

    Only the initialisation of the model draws from these. The order of the images and their augmentation come from
    generators of their own (``data.batches.epoch_generator``), and sampled labels from the preconditioner's generator.
    So a resumed run needs no saved random state.

    Args:
        seed: Seed of the run, from 0 to 2³² - 1.
    """
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  # for libraries that draw from NumPy's global state
    torch.manual_seed(seed)


@contextlib.contextmanager
def determinism(is_asked_for: bool, device: torch.device) -> Iterator[None]:
    """Make PyTorch use deterministic kernels inside, and raise for an operation that has none.

    Args:
        is_asked_for: ``deterministic`` of the configuration; if false, nothing is changed.
        device: Where to compute.

    Raises:
        ConfigError: If this process has already used the GPU without the variable that cuBLAS needs.
    """
    if not is_asked_for:
        yield
        return
    if device.type == "cuda":
        _prepare_cublas()
    settings = torch.utils.deterministic
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        settings.fill_uninitialized_memory,  # type: ignore[attr-defined]  # a property of the module
    )
    try:
        torch.use_deterministic_algorithms(True)
        # Otherwise PyTorch fills every new tensor with NaN, which costs a kernel each; no result here reads it.
        settings.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        settings.fill_uninitialized_memory = before[2]  # type: ignore[attr-defined]


def _prepare_cublas() -> None:
    if os.environ.get(CUBLAS_VARIABLE) in CUBLAS_VALUES:
        return
    if _has_used_cuda():
        raise ConfigError(
            f"deterministic=true needs {CUBLAS_VARIABLE}={CUBLAS_VALUES[0]} in the environment before the first use of "
            "the GPU, and this process has used it; give runs with deterministic=true a command of their own."
        )
    os.environ[CUBLAS_VARIABLE] = CUBLAS_VALUES[0]


def _has_used_cuda() -> bool:
    """Whether there has been a tensor on a GPU, without which nothing can have used cuBLAS."""
    if not torch.cuda.is_initialized():
        return False
    devices = range(torch.cuda.device_count())
    return any(torch.cuda.memory_stats(index).get("allocation.all.allocated", 0) > 0 for index in devices)
