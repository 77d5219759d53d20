"""Models whose layers lie on several devices: what is looked at together has to be brought together."""

from collections.abc import Sequence

from torch import Tensor


def on_one_device(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the tensors on the device of the first; those that are there are not copied."""
    return [tensor.to(tensors[0].device) for tensor in tensors]
