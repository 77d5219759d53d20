"""One setting with a network of its own, that takes training steps of a chosen kind on one mini-batch."""

import dataclasses
import time
from enum import StrEnum

import torch
import torch.nn.functional as F
from torch import Tensor

from kfac_sua.bench.arithmetic import Arithmetic
from kfac_sua.bench.clock import seconds_now
from kfac_sua.build import build_model, build_optimizer, build_preconditioner, memory_format
from kfac_sua.config import Config
from kfac_sua.preconditioner import KroneckerPreconditioner
from kfac_sua.training.precision import compute_logits
from kfac_sua.training.timing import Stopwatch

NUM_CLASSES = 10
PHASES = ("forward_backward", "statistics", "inversion", "application", "optimizer")
"""Parts of a step. The stopwatch may know others, such as the making of mini-batches, which has no part here."""


class StepKind(StrEnum):
    """What a step does besides applying the inverses at hand."""

    plain = "plain"
    statistics = "statistics"
    """Also measures statistics."""
    refresh = "refresh"
    """Also measures statistics and inverts."""


@dataclasses.dataclass(frozen=True)
class StepTime:
    """Seconds of one step, by the clock of ``clock.py``, and of its parts."""

    seconds: float
    split: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Batch:
    """The mini-batch that every setting trains on, on the device.

    Args:
        inputs: Images, ``[batch, 3, 32, 32]``.
        labels: Their classes, ``[batch]``.
    """

    inputs: Tensor
    labels: Tensor

    @classmethod
    def random(cls, size: int, arithmetic: Arithmetic) -> "Batch":
        """Draw images from a normal distribution; what a step costs does not depend on what they show."""
        generator = torch.Generator().manual_seed(0)
        inputs = torch.randn(size, 3, 32, 32, generator=generator).to(arithmetic.dtype)
        labels = torch.randint(NUM_CLASSES, (size,), generator=generator)
        return cls(inputs.to(arithmetic.device), labels.to(arithmetic.device))


class Contender:
    """One setting with a network of its own.

    Args:
        config: Its configuration.
        arithmetic: The number formats of training.
        batch: The mini-batch.
    """

    def __init__(self, config: Config, arithmetic: Arithmetic, batch: Batch) -> None:
        torch.manual_seed(config.seed)
        self._device = batch.inputs.device
        self._inputs = batch.inputs.to(memory_format=memory_format(config))
        self._labels = batch.labels
        self._precision = arithmetic.precision
        self.model = build_model(config, NUM_CLASSES, self._device).to(arithmetic.dtype)
        self.preconditioner = build_preconditioner(config.preconditioner, self.model, config.seed)
        self._optimizer = build_optimizer(config.optimizer, self.model)

    @property
    def steps_per_period(self) -> dict[StepKind, int]:
        """How many steps of each kind a refresh period has, without kinds that it has none of."""
        return {StepKind.plain: 1} if self.preconditioner is None else steps_per_period(self.preconditioner)

    def make_due(self, kind: StepKind) -> None:
        """Make the next step one of this kind, which must be one of ``steps_per_period``."""
        if self.preconditioner is not None:
            make_due(self.preconditioner, kind)

    def forward(self) -> tuple[Tensor, Tensor]:
        """Return the logits, ``[batch, classes]``, and the loss."""
        logits = compute_logits(self.model, self._inputs, self._precision)
        return logits, F.cross_entropy(logits, self._labels)

    def step(self, watch: Stopwatch) -> None:
        """Take one training step, its parts attributed to phases as in ``training/loop.py``."""
        preconditioner = self.preconditioner
        if preconditioner is not None:
            preconditioner.phase = watch.phase
        with watch.phase("forward_backward"):
            logits, loss = self.forward()
            self._optimizer.zero_grad(set_to_none=True)
            if preconditioner is not None:
                preconditioner.fisher_backward(logits)
            loss.backward()
        if preconditioner is not None:
            with watch.phase("application"):
                preconditioner.step(lr=self._optimizer.param_groups[0]["lr"])
        with watch.phase("optimizer"):
            self._optimizer.step()

    def timed_step(self) -> StepTime:
        """Take one training step and return its seconds."""
        watch = Stopwatch(self._device, time.process_time)
        started = seconds_now(self._device)
        self.step(watch)
        seconds = seconds_now(self._device) - started
        totals = watch.totals()
        return StepTime(seconds, {phase: totals[phase] for phase in PHASES})


def steps_per_period(preconditioner: KroneckerPreconditioner) -> dict[StepKind, int]:
    """Return how many steps of each kind a refresh period has, without kinds that it has none of."""
    period, factor_period = preconditioner.settings.inverse_period, preconditioner.factor_period
    measuring = period // factor_period
    counts = {StepKind.plain: period - measuring, StepKind.statistics: measuring - 1, StepKind.refresh: 1}
    return {kind: count for kind, count in counts.items() if count}


def make_due(preconditioner: KroneckerPreconditioner, kind: StepKind) -> None:
    """Make the next step one of this kind, which must be one of ``steps_per_period``."""
    is_due = {
        StepKind.plain: not preconditioner.statistics_due,
        StepKind.statistics: preconditioner.statistics_due and not preconditioner.inverses_due,
        StepKind.refresh: preconditioner.inverses_due,
    }
    if not is_due[kind]:
        position = {StepKind.plain: 1, StepKind.statistics: preconditioner.factor_period, StepKind.refresh: 0}
        preconditioner.go_to_step(position[kind])
