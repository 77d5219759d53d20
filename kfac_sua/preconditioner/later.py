"""Flags on the device that the host reads once it has waited for the device for another reason."""

import torch
from torch import Tensor


class LaterFlags:
    """Copies flags to the host without waiting for them.

    Args:
        flags: Of any shape, on any device.
    """

    def __init__(self, flags: Tensor) -> None:
        self._copy = torch.empty(flags.shape, dtype=flags.dtype, pin_memory=flags.is_cuda)
        self._copy.copy_(flags, non_blocking=True)
        self._copied = torch.cuda.Event() if flags.is_cuda else None
        if self._copied is not None:
            self._copied.record(torch.cuda.current_stream(flags.device))

    def read(self) -> list[bool]:
        """Return them; waits for the copy, which is over if the device has been waited for since."""
        if self._copied is not None:
            self._copied.synchronize()
        return [bool(flag) for flag in self._copy]
