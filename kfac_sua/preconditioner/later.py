"""Flags on the device that the host reads once it has waited for the device for another reason."""

import ctypes

import torch
from torch import Tensor


class LaterFlags:
    """Copies flags to the host without waiting for them.

    Args:
        flags: Bool, of any shape, on any device.
    """

    def __init__(self, flags: Tensor) -> None:
        self._copy = torch.empty(flags.shape, dtype=torch.bool, pin_memory=flags.is_cuda)
        self._copy.copy_(flags, non_blocking=True)
        self._copied = torch.cuda.Event() if flags.is_cuda else None
        if self._copied is not None:
            self._copied.record(torch.cuda.current_stream(flags.device))

    def read(self) -> list[bool]:
        """Return them; waits for the copy, which is over if the device has been waited for since."""
        if self._copied is not None:
            self._copied.synchronize()
        # Memory of the host, read as such: no operation of PyTorch, which would count as a wait for the device.
        return [bool(byte) for byte in ctypes.string_at(self._copy.data_ptr(), self._copy.numel())]
