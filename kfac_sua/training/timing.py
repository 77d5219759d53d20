"""Where the training time goes: a stopwatch with exclusive phases that never stops the device."""

import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch

# Together the wall time of an epoch's training part: `captured` are steps that the device carries out as a whole, and
# `other` is what no other phase takes of it (metrics, progress).
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
# Around the training parts: evaluation, and the writing of records and checkpoints.
OUTSIDE_PHASES = ("evaluation", "writing")
PHASES = (*TRAINING_PHASES, *OUTSIDE_PHASES)


class Stopwatch:
    """Accumulates seconds per phase; a phase inside another takes its time away from the outer one.

    Entering and leaving only leaves marks on a timeline: the clock's reading on the CPU, an event in the stream on
    CUDA, where kernels run long after they are launched. :meth:`totals` waits for the device once and adds up the
    intervals between marks. What happens outside every phase (preparation, messages) is not counted.

    While a step is captured as a CUDA graph it leaves none: a replay is timed as a whole, by the phase around it.

    Args:
        device: The device whose work is timed.
        clock: Seconds of a monotonic clock, read on the CPU.
        is_on: Whether it leaves marks at all; two events per phase take a GPU's host longer than some phases last.
    """

    def __init__(
        self, device: torch.device | str, clock: Callable[[], float] = time.perf_counter, *, is_on: bool = True
    ) -> None:
        self._is_on = is_on
        self._is_cuda = torch.device(device).type == "cuda"
        self._clock = clock
        self._totals = dict.fromkeys(PHASES, 0.0)
        self._open: list[str] = []
        # Each mark, with the phase that it opens; None outside every phase.
        self._marks: list[tuple[float | torch.cuda.Event, str | None]] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Attribute the time spent inside to ``name``, but for phases nested in it.

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
        """Attribute to another phase what comes until the innermost one is left; leaves a mark only if it is another.

        Args:
            name: One of ``PHASES``.
        """
        if self._open[-1] != name:
            self._open[-1] = name
            self._mark()

    def totals(self) -> dict[str, float]:
        """Return the seconds per phase since the start, waiting for the device."""
        if self._is_cuda:
            torch.cuda.synchronize()
        for (start, name), (end, _) in itertools.pairwise(self._marks):
            if name is not None:
                self._totals[name] += _seconds_between(start, end)
        del self._marks[:-1]  # the last mark opens the next interval
        return dict(self._totals)

    def restore(self, totals: Mapping[str, float]) -> None:
        """Go on from the totals of an earlier process.

        Args:
            totals: What :meth:`totals` returned then.
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
