"""The loss of single mini-batches, kept on the device until it is asked for (``log_interval``).

The sum of losses that every epoch has on the device is copied before and after the steps in question, and a loss is the
difference of the two. So steps are what they are without, captured ones too, and nothing waits.
"""

import torch

from kfac_sua.training.evaluate import ErrorCounter
from kfac_sua.training.process_group import ProcessGroup


class StepLosses:
    """Remembers the loss of every n-th step.

    Args:
        sums: The sums of the epoch in progress.
        interval: Every how many steps, by their number; ``None`` for never.
        batch_size: Images per mini-batch, of all processes together.
        num_batches: Mini-batches per epoch: at most so many steps are taken before what was noted is fetched.
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
        size = 0 if interval is None else num_batches + 2  # also what the last fetch left, and the epoch's beginning
        self._copies = torch.zeros(size, dtype=torch.float64, device=sums.own_loss_sum.device)

    def note(self, step: int, *, begins: bool = False) -> None:
        """Look at the sum of losses, if a difference to come needs it: before an epoch's first step, and after each.

        Args:
            step: Steps taken so far.
            begins: Whether the epoch begins, or goes on, with the next one.
        """
        if self._interval is None or (step % self._interval and (step + 1) % self._interval):
            return  # neither a step in question nor the one before
        if not begins and self._steps and self._steps[-1] == step:
            return  # the mini-batch was skipped
        self._copies[len(self._steps)].copy_(self._sums.own_loss_sum)
        self._steps.append(step)

    def fetch(self) -> list[tuple[int, float]]:
        """Return what was noted since the last time, as number of the step and mean loss in nats.

        Waits for the device, where there is something; all processes have to ask.
        """
        if self._interval is None or len(self._steps) < 2:
            return []
        steps, sums = self._steps, self._process_group.all_reduce_sum(self._copies[: len(self._steps)]).tolist()
        self._copies[0].copy_(self._copies[len(steps) - 1])
        self._steps = [steps[-1]]
        return [
            (step, (sums[place] - sums[place - 1]) / self._batch_size)
            for place, step in enumerate(steps)
            if place and step == steps[place - 1] + 1 and step % self._interval == 0
        ]
