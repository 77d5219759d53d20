"""Where the training time goes: a stopwatch with exclusive phases that does not synchronise with the device."""

import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch

# Their sum is the wall time of an epoch's training part: `captured` are steps that the device replays as a whole, and
# `other` is the rest (metrics, progress).
TRAINING_PHASES = (
    "data",
    "forward_backward",
    "statistics",
    "inversion",
    "application",
    "optimizer",
    "captured",
    "other",
)
# Outside the training part: evaluation, and writing records and checkpoints.
OUTSIDE_PHASES = ("evaluation", "writing")
PHASES = (*TRAINING_PHASES, *OUTSIDE_PHASES)


class Stopwatch:
    """Accumulates seconds per phase; time in a nested phase does not count for the outer one.

    Entering and leaving a phase only records a mark: the time on a CPU, and an event in the stream on CUDA, where
    kernels run long after their launch. :meth:`totals` waits for the device once and adds up the intervals between
    marks. Time outside all phases (preparation, messages) is not counted.

    While a step is captured as a CUDA graph no marks are recorded; a replay is timed as a whole, in the outer phase.

    Args:
        device: The device to time.
        clock: Seconds of a monotonic clock, read on the CPU.
        is_on: Whether marks are recorded; on a GPU two events per phase take longer on the host than some phases.
    """

    def __init__(
        self, device: torch.device | str, clock: Callable[[], float] = time.perf_counter, *, is_on: bool = True
    ) -> None:
        self._is_on = is_on
        self._is_cuda = torch.device(device).type == "cuda"
        self._clock = clock
        self._totals = dict.fromkeys(PHASES, 0.0)
        self._open: list[str] = []
        # Each mark with the phase that begins at it; None outside all phases.
        self._marks: list[tuple[float | torch.cuda.Event, str | None]] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Attribute the time inside to ``name``, except for nested phases.

        Args:
            name: One of ``PHASES``.

        Raises:
            ValueError: If there is no such phase.
        """
        if name not in self._totals:
            raise ValueError(f"There is no phase '{name}'; choose one of {', '.join(PHASES)}.")
        self._open.append(name)
        self._mark()
        try:
            yield
        finally:
            self._open.pop()
            self._mark()

    def switch(self, name: str) -> None:
        """Attribute the rest of the innermost phase to another one; records a mark only if the phase changes.

        Args:
            name: One of ``PHASES``.
        """
        if self._open[-1] != name:
            self._open[-1] = name
            self._mark()

    def totals(self) -> dict[str, float]:
        """Return the seconds per phase since the start; waits for the device."""
        if self._is_cuda:
            torch.cuda.synchronize()
        for (start, name), (end, _) in itertools.pairwise(self._marks):
            if name is not None:
                self._totals[name] += _seconds_between(start, end)
        del self._marks[:-1]  # the last mark opens the next interval
        return dict(self._totals)

    def restore(self, totals: Mapping[str, float]) -> None:
        """Continue from the totals of an earlier attempt.

        Args:
            totals: What :meth:`totals` returned there.
        """
        self._totals.update(totals)

    def _mark(self) -> None:
        if not self._is_on:
            return
        instant: float | torch.cuda.Event
        if self._is_cuda:
            if torch.cuda.is_current_stream_capturing():  # the event would be part of the graph
                return
            instant = torch.cuda.Event(enable_timing=True)
            instant.record()
        else:
            instant = self._clock()
        self._marks.append((instant, self._open[-1] if self._open else None))


def _seconds_between(start: float | torch.cuda.Event, end: float | torch.cuda.Event) -> float:
    if isinstance(start, float) and isinstance(end, float):
        return end - start
    return start.elapsed_time(end) / 1000  # type: ignore[union-attr, arg-type]  # events, in milliseconds
