"""Mixed precision: in what the network computes, while parameters, losses and the preconditioner stay in float32."""

import torch
from torch import Tensor, nn

from kfac_sua.config import Precision


def compute_logits(network: nn.Module, inputs: Tensor, precision: Precision) -> Tensor:
    """Return the logits of a mini-batch, for losses in the precision of the inputs.

    bfloat16 has the exponents of float32, so that no loss scale is needed. float16 would need one: see
    ``examples/amp.py`` for a loop with a ``GradScaler``.

    Args:
        network: Network, perhaps wrapped.
        inputs: Images, ``[batch, channels, height, width]``.
        precision: In what convolutions and matrix products compute.
    """
    if precision is Precision.float32:
        return network(inputs)
    with torch.autocast(inputs.device.type, torch.bfloat16):
        logits: Tensor = network(inputs)
    return logits.to(inputs.dtype)
