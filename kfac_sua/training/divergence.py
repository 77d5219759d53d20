"""Whether the losses of an epoch are still finite, checked without waiting for the device."""

from kfac_sua.preconditioner.host_copy import HostCopy
from kfac_sua.training.evaluate import ErrorCounter

CHECK_PERIOD = 50
"""Steps between two checks. A check reads what the one before copied, so divergence is noticed within twice as many
steps."""


class Diverged(Exception):
    """The loss is not finite any more; so is the sum of the epoch's losses."""


class DelayedCheck:
    """Checks the sum of losses as it was at the check before, whose copy has reached the host since.

    So the host never runs more than two checks ahead of the device.

    Args:
        sums: The sums of the epoch.
    """

    def __init__(self, sums: ErrorCounter) -> None:
        self._sums = sums
        self._copy: HostCopy | None = None

    def have_diverged(self) -> bool:
        """Return whether a loss up to the check before was not finite, and begin the next copy."""
        have_diverged = self._copy is not None and not self._copy.read().isfinite()
        self._copy = HostCopy(self._sums.loss_sum())
        return bool(have_diverged)
