"""In what convolutions and matrix products compute, of the network and of the preconditioner; all else is float32."""

import contextlib
import warnings
from collections.abc import Iterator

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
    # The older of PyTorch's two interfaces: it keeps both in agreement, where the newer one makes torch.compile of
    # releases before 2.12 raise.
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    try:
        _allow_tf32(*[precision is not Precision.float32] * 2)
        yield
    finally:
        _allow_tf32(*before)


def _allow_tf32(in_products: bool, in_convolutions: bool) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Please use the new API settings")  # releases before 2.12
        torch.backends.cuda.matmul.allow_tf32 = in_products
        torch.backends.cudnn.allow_tf32 = in_convolutions


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
