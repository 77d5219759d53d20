"""Whether the loss is still finite, seen without a wait for the device."""

from kfac_sua.preconditioner.host_copy import HostCopy
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
    """

    def __init__(self, sums: ErrorCounter) -> None:
        self._sums = sums
        self._last: HostCopy | None = None

    def has_diverged(self) -> bool:
        """Say whether the losses up to the last look were not all finite, and begin another look."""
        has_diverged = self._last is not None and not self._last.read().isfinite()  # begun many steps ago
        self._last = HostCopy(self._sums.loss_sum())
        return bool(has_diverged)
