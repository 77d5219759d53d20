"""Whether the loss is still finite, seen without a wait for the device."""

import torch

from kfac_sua.training.evaluate import ErrorCounter

LOOK_PERIOD = 50
"""Steps between two looks; divergence is seen at the second one after it, within twice as many steps."""


class Diverged(Exception):
    """The loss is not finite any more; the sums of the epoch say so too."""


class LateLook:
    """Looks at sums of losses without waiting for the device: what one look copies, the next one reads.

    So the host never runs more than two looks ahead of the device.

    Args:
        sums: The sums.
        device: Where they are.
    """

    def __init__(self, sums: ErrorCounter, device: torch.device) -> None:
        self._sums = sums
        self._copy = torch.zeros((), dtype=torch.float64, pin_memory=device.type == "cuda")
        self._copied = torch.cuda.Event() if device.type == "cuda" else None

    def has_diverged(self) -> bool:
        """Say whether the losses up to the last look were not all finite, and begin another look."""
        has_diverged = not self._read()
        self._copy.copy_(self._sums.loss_sum(), non_blocking=True)
        if self._copied is not None:
            self._copied.record()
        return has_diverged

    def _read(self) -> bool:
        """Return whether what the last look copied is finite; zero, before the first one."""
        if self._copied is not None:
            self._copied.synchronize()  # of a copy that was begun many steps ago
        return bool(self._copy.isfinite())
