"""Numbers on the device that the host reads later, when it has waited for the device anyway, or long afterwards."""

import ctypes

import torch
from torch import Tensor


class HostCopy:
    """Copies a tensor to the host without waiting for it.

    Args:
        values: On any device.
    """

    def __init__(self, values: Tensor) -> None:
        self._copy = torch.empty(values.shape, dtype=values.dtype, pin_memory=values.is_cuda)
        self._copy.copy_(values, non_blocking=True)
        self._copied = torch.cuda.Event() if values.is_cuda else None
        if self._copied is not None:
            self._copied.record(torch.cuda.current_stream(values.device))

    def read(self) -> Tensor:
        """Return the copy; waits for it, which is over if the device has been waited for since."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._copy

    def read_flags(self) -> list[bool]:
        """Return a copy of bools as such."""
        copy = self.read()
        assert copy.dtype == torch.bool
        # Memory of the host, read as such: no operation of PyTorch, which would count as a wait for the device.
        return [bool(byte) for byte in ctypes.string_at(copy.data_ptr(), copy.numel())]
