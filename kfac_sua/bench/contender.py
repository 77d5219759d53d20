"""One setting with its own network, which takes training steps of a chosen kind on one mini-batch."""

import dataclasses
import time

import torch
import torch.nn.functional as F
from torch import Tensor

from kfac_sua.bench.arithmetic import Arithmetic
from kfac_sua.bench.clock import seconds_now
from kfac_sua.bench.step_kinds import StepKind, make_due, steps_per_period
from kfac_sua.build import build_model, build_optimizer, build_preconditioner, memory_format
from kfac_sua.config import Config
from kfac_sua.data.sizes import IMAGE_SHAPE, SIZES
from kfac_sua.preconditioner import CapturedStep, StepGraph
from kfac_sua.training import capturing
from kfac_sua.training.precision import compute_logits
from kfac_sua.training.timing import Stopwatch

NUM_CLASSES = SIZES["cifar10"].classes
PHASES = ("forward_backward", "statistics", "inversion", "application", "optimizer")
"""Parts of a step. The stopwatch has others, such as the making of mini-batches, which do not occur here."""
CAPTURED = "captured"
"""The only part of a replayed step, since the parts of a graph cannot be timed apart."""

STEPS_TOGETHER = {"cpu": 1, "cuda": 10}
"""Most plain steps between two waits for the device. With a wait after every step the host would fall behind."""

SPLIT_APART = {"cpu": False, "cuda": True}
"""Whether whole steps are timed without a stopwatch: on CUDA its events take up to 2 ms of an eager step."""

MOST_STEPS_TO_CAPTURE = 10
"""Most plain steps until one is a replay: three to warm up, one to capture, and some to spare."""
ENOUGH_REPLAYS = 6
"""A capture that has had this many replays does not count as futile when it is given up."""
MOST_ROUNDS = 5
"""Most refreshes until captures outlast them."""


@dataclasses.dataclass(frozen=True)
class StepTime:
    """Seconds of one step, by the clock of ``clock.py``, and of its parts.

    Args:
        seconds: Of the whole step.
        split: Phase to seconds: ``PHASES``, and ``captured`` where there were replays.
        is_replay: Whether a captured step was replayed.
    """

    seconds: float
    split: dict[str, float]
    is_replay: bool = False


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
        inputs = torch.randn(size, *IMAGE_SHAPE, generator=generator).to(arithmetic.dtype)
        labels = torch.randint(NUM_CLASSES, (size,), generator=generator)
        return cls(inputs.to(arithmetic.device), labels.to(arithmetic.device))


class Contender:
    """One setting with a network of its own.

    Where training would replay its plain steps as a CUDA graph, so does this, unless ``capture=false``.

    Args:
        config: Its configuration.
        arithmetic: The number formats of training.
        batch: The mini-batch.
        graph: What captures and replays, on any device; by default CUDA graphs on CUDA, and nothing elsewhere.
    """

    def __init__(self, config: Config, arithmetic: Arithmetic, batch: Batch, graph: StepGraph | None = None) -> None:
        torch.manual_seed(config.seed)
        self._config = config
        self._device = batch.inputs.device
        self._inputs = batch.inputs.to(memory_format=memory_format(config))
        self._labels = batch.labels
        self._precision = arithmetic.precision
        self.model = build_model(config, NUM_CLASSES, self._device).to(arithmetic.dtype)
        self.preconditioner = build_preconditioner(config, self.model)
        self._optimizer = build_optimizer(config.optimizer, self.model)
        self._watch = self._new_watch()
        self._captured: CapturedStep[None] | None = None
        self._why_not_tried = self._find_why_not(graph)
        if not self._why_not_tried:
            self._captured = CapturedStep(
                self._watched_step, self.model, self._optimizer, self.preconditioner, graph=graph
            )
        self._last_is_replay = False
        self._num_timed = self._num_replayed = 0

    @property
    def steps_per_period(self) -> dict[StepKind, int]:
        """How many steps of each kind a refresh period has, without kinds that it has none of."""
        return {StepKind.plain: 1} if self.preconditioner is None else steps_per_period(self.preconditioner)

    @property
    def steps_together(self) -> int:
        """Plain steps that are timed together: as many as follow each other, up to ``STEPS_TOGETHER``."""
        most = STEPS_TOGETHER[self._device.type]
        return most if self.preconditioner is None else max(1, min(most, self.preconditioner.factor_period - 1))

    @property
    def is_capturing(self) -> bool:
        """Whether plain steps are replayed, or will be."""
        return self._captured is not None and not self._captured.why_eager

    @property
    def is_captured(self) -> bool:
        """Whether all plain steps that were timed were replays, of one step at least."""
        return 0 < self._num_timed == self._num_replayed

    @property
    def why_eager(self) -> str:
        """Why not all plain steps that were timed were replays; empty if they were."""
        if self.is_captured:
            return ""
        if self._captured is None or self._captured.why_eager:
            return self._why_not_tried if self._captured is None else self._captured.why_eager
        return f"{self._num_replayed} of {self._num_timed} were replays, as what a capture depends on has changed"

    def make_due(self, kind: StepKind) -> None:
        """Make the next step one of this kind, which must be one of ``steps_per_period``."""
        if self.preconditioner is not None:
            make_due(self.preconditioner, kind)

    def forward(self) -> tuple[Tensor, Tensor]:
        """Return the logits, ``[batch, classes]``, and the loss."""
        logits = compute_logits(self.model, self._inputs, self._precision)
        return logits, F.cross_entropy(logits, self._labels)

    def step(self, watch: Stopwatch) -> None:
        """Take one training step eagerly, its parts attributed to phases as in ``training/step.py``."""
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

    def warm_up(self) -> None:
        """Take steps until plain steps are replays, if they can be, and refreshes no longer change their captures.

        Raises:
            RuntimeError: If ``capture=true`` and steps cannot be captured.
        """
        self.timed_step()  # the first refresh
        self.timed_step()
        for _ in range(MOST_ROUNDS):
            if not self.is_capturing or not self._changes_captures():
                break
        if self._config.capture is True and not self.is_capturing:
            raise RuntimeError(
                f"capture=true, but with preconditioner={self._config.preconditioner.name}: {self.why_eager}; give "
                f"capture=auto or capture=false."
            )

    def timed_turn(self, kind: StepKind) -> StepTime:
        """Take steps of this kind, which must be one of ``steps_per_period``, and return the seconds of one.

        On CUDA several plain steps are timed together, so that the host runs ahead of the device as in training.
        """
        if kind is not StepKind.plain:
            return self._timed_apart(1, kind)
        self._settle()
        time = self._timed_apart(self.steps_together, kind)
        self._num_timed += 1
        self._num_replayed += time.is_replay
        return time

    def timed_step(self) -> StepTime:
        """Take the training step that is due and return its seconds."""
        return self._timed(1)

    def _timed_apart(self, count: int, kind: StepKind) -> StepTime:
        """Take steps of a kind without a stopwatch where it costs time, and others for what their parts take."""
        self._make_all_due(count, kind)
        if not SPLIT_APART[self._device.type]:
            return self._timed(count)
        unwatched = self._timed(count, is_watched=False)
        self._make_all_due(count, kind)
        return dataclasses.replace(unwatched, split=self._timed(count).split)

    def _make_all_due(self, count: int, kind: StepKind) -> None:
        """Make the next ``count`` steps ones of this kind."""
        if count > 1 and self.preconditioner is not None:
            self.preconditioner.go_to_step(1)  # so that as many are plain
        self.make_due(kind)

    def _timed(self, count: int, *, is_watched: bool = True) -> StepTime:
        """Take steps between two waits for the device, and return the mean seconds of one."""
        watch = self._watch = self._new_watch(is_on=is_watched)
        num_replays = 0
        started = seconds_now(self._device)
        for _ in range(count):
            self._take_step(watch)
            num_replays += self._last_is_replay
        seconds = (seconds_now(self._device) - started) / count
        totals = watch.totals()
        # An eager step in the captured phase spends there only the host's checks, which belong to no phase.
        phases = (*PHASES, CAPTURED) if num_replays else PHASES
        return StepTime(seconds, {phase: totals[phase] / count for phase in phases}, num_replays == count)

    def _take_step(self, watch: Stopwatch) -> None:
        """Take the step that is due as training would: by a replay, if it is plain and captured."""
        captured = self._captured
        if captured is None or captured.why_eager:
            self._last_is_replay = False
            self.step(watch)
            return
        before = captured.num_replays
        with watch.phase(CAPTURED):
            captured()
        self._last_is_replay = captured.num_replays > before

    def _watched_step(self) -> None:
        with self._watch.phase("other"):  # otherwise time outside of the inner phases would count as a replay
            self.step(self._watch)

    def _changes_captures(self) -> bool:
        """Take steps of all kinds, and return whether a plain step was captured among them."""
        assert self._captured is not None
        before = self._captured.num_captures
        for kind in self.steps_per_period:  # plain ones first
            self._settle()
            for _ in range(ENOUGH_REPLAYS if kind is StepKind.plain else 1):
                self.make_due(kind)
                self.timed_step()
        self._settle()
        return self._captured.num_captures > before

    def _settle(self) -> None:
        """Take plain steps until one is a replay, so that no timed step is a warm-up or a capture."""
        for _ in range(MOST_STEPS_TO_CAPTURE):
            if not self.is_capturing or self._last_is_replay or StepKind.plain not in self.steps_per_period:
                break
            self.make_due(StepKind.plain)
            self.timed_step()

    def _find_why_not(self, graph: StepGraph | None) -> str:
        """Return why training would not try to capture this setting, in a clause; empty if it would."""
        if self._config.capture is False:
            return "capture=false"
        reason = "" if graph is not None else capturing.why_no_graphs(self._device)
        return reason or capturing.why_eager(self._config, self.preconditioner)

    def _new_watch(self, *, is_on: bool = True) -> Stopwatch:
        return Stopwatch(self._device, time.process_time, is_on=is_on)
