"""Precision and device of factors and inverses, whatever precision the model trains in."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

IEEE = ("none", "ieee")
"""Values of ``fp32_precision`` under which PyTorch multiplies float32 matrices in IEEE float32; ``none``: unset."""


def at_least_float32(values: Tensor) -> Tensor:
    """Return the tensor in the precision of factors and inverses: float64 if it is float64, else float32."""
    return values.to(_kept_dtype(values.dtype))


def fits(kept: Tensor, weight: Tensor) -> bool:
    """Whether a tensor that is kept for a weight has the weight's device, and the precision of its inverses."""
    return kept.dtype == _kept_dtype(weight.dtype) and kept.device == weight.device


def on_one_device(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return all tensors on the device of the first, for models on several devices; only others are copied."""
    return [tensor.to(tensors[0].device) for tensor in tensors]


def _kept_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


@contextmanager
def factor_precision() -> Iterator[None]:
    """Run Gram matrices, factorisations and the forming of inverses in IEEE float32 inside, or in float64.

    TF32 has 10 bits of mantissa and bfloat16 has 7: a Gram matrix of such products has errors of 1e-3 and 1e-2 of its
    largest eigenvalue, and the damping is often smaller than that. So autocast is switched off inside, and so are the
    process-wide switches that let float32 products run in less precision, on CUDA and on the CPU. Afterwards they are
    restored as the caller set them, through either of PyTorch's two interfaces: ``fp32_precision``, or ``allow_tf32``
    and ``set_float32_matmul_precision``.
    """
    with without_autocast(), _ieee_products():
        yield


@contextmanager
def application_precision() -> Iterator[None]:
    """Apply inverses inside in the precision of their form: IEEE float32, or bfloat16 parts with float32 sums.

    A single TF32 product has errors of up to 10 % in directions of high curvature, where gradients are large and
    inverses small (measured: ``docs/gpu.md``).
    """
    with factor_precision(), _float32_sums():
        yield


def has_fast_products(like: Tensor) -> bool:
    """Whether the caller allows float32 products in less than IEEE precision, on a device that has units for them.

    Args:
        like: A tensor with the device and the precision of the inverses.
    """
    return (
        like.dtype == torch.float32
        and like.is_cuda
        and torch.backends.cuda.matmul.fp32_precision not in IEEE
        and _has_tensor_cores(like.device)
    )


@lru_cache
def _has_tensor_cores(device: torch.device) -> bool:
    """Whether a device multiplies bfloat16 and TF32 on tensor cores: NVIDIA's do since Ampere (capability 8.0)."""
    return torch.version.cuda is not None and torch.cuda.get_device_capability(device) >= (8, 0)


@contextmanager
def without_autocast() -> Iterator[None]:
    """Switch autocast off inside, where it is on."""
    with ExitStack() as stack:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


@contextmanager
def _float32_sums() -> Iterator[None]:
    """Keep sums of bfloat16 products in float32 inside, also where a product is split along its inner dimension."""
    matmul: Any = torch.backends.cuda.matmul
    if not matmul.allow_bf16_reduced_precision_reduction:
        yield
        return
    # Newer releases have a second switch, which assigning a single value to the first one would reset.
    second = getattr(matmul, "allow_bf16_reduced_precision_reduction_split_k", None)
    matmul.allow_bf16_reduced_precision_reduction = False
    try:
        yield
    finally:
        matmul.allow_bf16_reduced_precision_reduction = True if second is None else (True, second)


@contextmanager
def _ieee_products() -> Iterator[None]:
    """Multiply float32 matrices in IEEE float32 inside.

    A switch is changed through the interface, newer or older, that it was set through: where the two disagree, either
    of them raises, in PyTorch's own code too.
    """
    switches = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    before = [switch.fp32_precision for switch in switches]
    if all(value in IEEE for value in before):
        yield
        return
    older = _older_setting()
    try:
        if older is not None:
            torch.set_float32_matmul_precision("highest")
        for switch in switches:
            if switch.fp32_precision not in IEEE:
                switch.fp32_precision = "ieee"
        yield
    finally:
        if older is not None:
            torch.set_float32_matmul_precision(older)
        for switch, value in zip(switches, before, strict=True):
            _restore(switch, value)


def _older_setting() -> str | None:
    """Return what ``set_float32_matmul_precision`` or ``allow_tf32`` has set; ``None`` if neither is in force."""
    try:
        return torch.get_float32_matmul_precision() if torch.backends.cuda.matmul.allow_tf32 else None
    except RuntimeError:  # the newer interface has been used since, with another value
        return None


def _restore(switch: Any, value: str) -> None:
    """Restore a switch; one with the value of PyTorch's more general switch stays unset, and follows that."""
    if switch.fp32_precision != value:
        switch.fp32_precision = "none"
    if switch.fp32_precision != value:
        switch.fp32_precision = value
