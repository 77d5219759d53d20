"""The precision of convolutions and matrix products, in network and preconditioner; everything else is float32."""

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from kfac_sua.config import Precision


@contextlib.contextmanager
def computing_in(precision: Precision, device: torch.device) -> Iterator[None]:
    """Set the precision of float32 convolutions and matrix products on a CUDA device inside.

    PyTorch's default is TF32 in convolutions and IEEE float32 in products. Here both have the same precision, so that
    plain SGD, mostly convolutions, and a preconditioner, mostly products, are compared in the same arithmetic. With
    ``bfloat16``, operations that autocast leaves in float32 compute in TF32. Nothing changes on a CPU. The process-wide
    switches are restored at the end.

    Args:
        precision: Any but ``auto``.
        device: Where to compute.
    """
    if device.type != "cuda":
        yield
        return
    older, newer = _older_switches(), [switch.fp32_precision for switch in _newer_switches()]
    is_allowed = precision is not Precision.float32
    try:
        _allow_tf32(is_allowed, is_allowed)
        yield
    finally:
        if older is not None:
            _allow_tf32(*older[:2])
            if _older_switches() != older:  # set_float32_matmul_precision has more than two values
                torch.set_float32_matmul_precision(older[2])
        for switch, value in zip(_newer_switches(), newer, strict=True):
            if switch.fp32_precision != value:
                switch.fp32_precision = value


def _allow_tf32(in_products: bool, in_convolutions: bool) -> None:
    """Set the switches through the older of PyTorch's two interfaces, which also sets the newer one.

    If only the newer one is set, code that reads the older one raises; torch.compile of some releases does.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Please use the new API settings")  # some releases warn
        torch.backends.cuda.matmul.allow_tf32 = in_products
        torch.backends.cudnn.allow_tf32 = in_convolutions


def _older_switches() -> tuple[bool, bool, str] | None:
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    try:
        return matmul.allow_tf32, cudnn.allow_tf32, torch.get_float32_matmul_precision()
    except RuntimeError:  # the newer interface has been used alone
        return None


def _newer_switches() -> list[Any]:
    cudnn: Any = torch.backends.cudnn
    return [torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn]


def compute_logits(network: nn.Module, inputs: Tensor, precision: Precision) -> Tensor:
    """Return the logits of a mini-batch, ``[batch, classes]``, in the dtype of the inputs.

    bfloat16 has the exponent range of float32, so it needs no loss scale. float16 would: ``examples/amp.py`` has a loop
    with a ``GradScaler``.

    Args:
        network: The network, which may be wrapped.
        inputs: Images, ``[batch, channels, height, width]``.
        precision: Precision of convolutions and matrix products.
    """
    if precision is not Precision.bfloat16:
        return network(inputs)
    with torch.autocast(inputs.device.type, torch.bfloat16):
        logits: Tensor = network(inputs)
    return logits.to(inputs.dtype)
