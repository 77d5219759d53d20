"""The losses of single mini-batches, kept on the device until they are fetched (``log_interval``).

The epoch's sum of losses, which is on the device, is copied before and after a logged step; the loss is the difference
of the two. So steps themselves are unchanged, captured ones too, and nothing waits for the device.
"""

import torch

from kfac_sua.training.evaluate import ErrorCounter
from kfac_sua.training.process_group import ProcessGroup


class StepLosses:
    """Remembers the loss of every n-th step.

    Args:
        sums: The sums of the epoch in progress.
        interval: Every how many steps a loss is logged; ``None`` for never.
        batch_size: Images per mini-batch, of all processes together.
        num_batches: Mini-batches per epoch; at most so many steps are taken between two fetches.
        process_group: The processes.
    """

    def __init__(
        self, sums: ErrorCounter, interval: int | None, batch_size: int, num_batches: int, process_group: ProcessGroup
    ) -> None:
        self._sums = sums
        self._interval = interval
        self._batch_size = batch_size
        self._process_group = process_group
        self._steps: list[int] = []
        size = (
            0 if interval is None else num_batches + 2
        )  # two more: the copy that the last fetch keeps, and the epoch's beginning
        self._copies = torch.zeros(size, dtype=torch.float64, device=sums.own_loss_sum.device)

    def note(self, step: int, *, begins: bool = False) -> None:
        """Copy the sum of losses if a logged step needs it; called before an epoch's first step and after each step.

        Args:
            step: Steps taken so far.
            begins: Whether the epoch begins, or is resumed, with the next step.
        """
        if self._interval is None or (step % self._interval and (step + 1) % self._interval):
            return  # neither a logged step nor the one before
        if not begins and self._steps and self._steps[-1] == step:
            return  # the mini-batch was skipped
        self._copies[len(self._steps)].copy_(self._sums.own_loss_sum)
        self._steps.append(step)

    def fetch(self) -> list[tuple[int, float]]:
        """Return the losses since the last fetch: pairs of a step's number and its mean loss in nats.

        Waits for the device if there are any; all processes have to call this.
        """
        if self._interval is None or len(self._steps) < 2:
            return []
        steps, sums = self._steps, self._process_group.all_reduce_sum(self._copies[: len(self._steps)]).tolist()
        self._copies[0].copy_(self._copies[len(steps) - 1])
        self._steps = [steps[-1]]
        return [
            (step, (sums[index] - sums[index - 1]) / self._batch_size)
            for index, step in enumerate(steps)
            if index and step == steps[index - 1] + 1 and step % self._interval == 0
        ]
