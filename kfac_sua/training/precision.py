"""In what convolutions and matrix products compute, of the network and of the preconditioner; all else is float32."""

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from kfac_sua.config import Precision


@contextlib.contextmanager
def computing_in(precision: Precision, device: torch.device) -> Iterator[None]:
    """Let float32 convolutions and matrix products on a CUDA device compute in a precision inside.

    PyTorch's default is TF32 in convolutions and IEEE float32 in products. Here both are the same, so that plain SGD,
    which is convolutions, and a preconditioner, which is products, are given the same arithmetic. Under ``bfloat16``,
    what autocast leaves in float32 computes in TF32. A CPU is left as it is. The process-wide switches come back as
    they were.

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
            if _older_switches() != older:  # set_float32_matmul_precision knows more than two values
                torch.set_float32_matmul_precision(older[2])
        for switch, value in zip(_newer_switches(), newer, strict=True):
            if switch.fp32_precision != value:
                switch.fp32_precision = value


def _allow_tf32(in_products: bool, in_convolutions: bool) -> None:
    """Set the switches through the older of PyTorch's two interfaces, which keeps both in agreement.

    Where the newer one is used alone, whatever reads the older one raises, in torch.compile of some releases too.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Please use the new API settings")  # said by some releases
        torch.backends.cuda.matmul.allow_tf32 = in_products
        torch.backends.cudnn.allow_tf32 = in_convolutions


def _older_switches() -> tuple[bool, bool, str] | None:
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    try:
        return matmul.allow_tf32, cudnn.allow_tf32, torch.get_float32_matmul_precision()
    except RuntimeError:  # the newer interface has set something else since
        return None


def _newer_switches() -> list[Any]:
    cudnn: Any = torch.backends.cudnn
    return [torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn]


def compute_logits(network: nn.Module, inputs: Tensor, precision: Precision) -> Tensor:
    """Return the logits of a mini-batch, for losses in the precision of the inputs.

    bfloat16 has the exponents of float32, so that no loss scale is needed. float16 would need one: see
    ``examples/amp.py`` for a loop with a ``GradScaler``.

    Args:
        network: Network, perhaps wrapped.
        inputs: Images, ``[batch, channels, height, width]``.
        precision: In what convolutions and matrix products compute.
    """
    if precision is not Precision.bfloat16:
        return network(inputs)
    with torch.autocast(inputs.device.type, torch.bfloat16):
        logits: Tensor = network(inputs)
    return logits.to(inputs.dtype)
