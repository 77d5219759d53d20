"""Seconds of one convolution's refresh and application, which take turns with the bare layer in one process."""

import dataclasses
import statistics
import time
from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from kfac_sua.bench.clock import seconds_now
from kfac_sua.bench.scaling.cases import COSTS, IMAGE_SIZE, TAPS_IN_FEATURES, Case, Layer
from kfac_sua.preconditioner import Application, KroneckerPreconditioner, KroneckerSettings, Structure
from kfac_sua.training.timing import Stopwatch

_SEED = 0
_SHORT_S = 1.0  # seconds for all turns; if they take less, there are more turns than asked for
_MOST_TURNS = 15


@dataclasses.dataclass(frozen=True)
class Seconds:
    """Spread of one cost over the repeats.

    Args:
        median: Median seconds.
        low: Least seconds.
        high: Most seconds.
    """

    median: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Measurement:
    """What a case costs, or why it was not measured.

    Args:
        seconds: By cost; empty if it was not measured. ``forward_backward`` is the bare layer's, in the same turns.
        repeats: Turns after the warm-up; 0 if it was not measured.
        is_low_rank: Whether a factor was kept as rows and inverted by the Woodbury identity.
        commit: Commit of the source, with ``+dirty`` for uncommitted changes; empty outside a git checkout.
        note: Why it was not measured; empty if it was.
    """

    seconds: Mapping[str, Seconds]
    repeats: int
    is_low_rank: bool = False
    commit: str = ""
    note: str = ""


class Contender:
    """The layer with weights of its own, bare or with a preconditioner around it.

    Args:
        layer: The convolution.
        case: Structure of its preconditioner; ``None`` for none.
        inputs: ``[N, C, H, H]``, on the device; they take a gradient, as in the middle of a network.
        output_grads: Gradient of the mean loss with respect to the outputs, in the same shape.
    """

    def __init__(self, layer: Layer, case: Case | None, inputs: Tensor, output_grads: Tensor) -> None:
        torch.manual_seed(_SEED)
        size = layer.kernel_size
        convolution = nn.Conv2d(layer.channels, layer.channels, size, padding=size // 2, bias=False)
        self._model = nn.Sequential(convolution).to(inputs.device).to(memory_format=torch.channels_last)
        self._inputs = inputs
        self._output_grads = output_grads
        self.preconditioner = None if case is None else KroneckerPreconditioner(self._model, settings=_settings(case))

    def step(self) -> dict[str, float]:
        """Take a step with a refresh and return its seconds by phase."""
        device = self._inputs.device
        watch = Stopwatch(device, clock=partial(seconds_now, device))
        self._inputs.grad = None
        self._model.zero_grad(set_to_none=True)
        if self.preconditioner is None:
            self._forward_backward(watch)
            return watch.totals()
        self.preconditioner.phase = watch.phase
        with self.preconditioner.capture():
            self._forward_backward(watch)
        self.preconditioner.update_factors()
        self.preconditioner.update_inverses()
        self.preconditioner.precondition_()
        return watch.totals()

    def is_low_rank(self, num_rows: int) -> bool:
        """Return whether a factor with this number of rows is kept as rows."""
        if self.preconditioner is None:
            return False
        (row,) = self.preconditioner.describe().rows
        return any(num_rows <= limit for limit in row.low_rank_rows)

    def _forward_backward(self, watch: Stopwatch) -> None:
        with watch.phase("forward_backward"):
            self._model(self._inputs).backward(self._output_grads)


def measure_layer(layer: Layer, cases: Sequence[Case], device: torch.device, repeats: int) -> dict[Case, Measurement]:
    """Measure cases of one layer, which take turns with the bare layer, one step each.

    Where turns are short there are more of them, as the median of a few would be noise.

    Args:
        layer: The convolution and its mini-batch.
        cases: Structures around it.
        device: Where to measure.
        repeats: Fewest turns after the warm-up, ≥ 1.

    Returns:
        One measurement per case, in order.
    """
    inputs, output_grads = _tensors(layer, device)
    contenders = [Contender(layer, case, inputs, output_grads) for case in (None, *cases)]
    turns = _take_turns(contenders, repeats)
    own = _spread([turn[0]["forward_backward"] for turn in turns])
    measured = {}
    for position, case in enumerate(cases, start=1):
        seconds = {cost: _spread([turn[position][cost] for turn in turns]) for cost in COSTS}
        is_low_rank = contenders[position].is_low_rank(layer.num_rows)
        measured[case] = Measurement(seconds | {"forward_backward": own}, len(turns), is_low_rank)
    return measured


def _take_turns(contenders: Sequence[Contender], repeats: int) -> list[list[dict[str, float]]]:
    """Return seconds by phase of every contender in every turn except the first, which warms up."""
    for contender in contenders:
        contender.step()
    turns: list[list[dict[str, float]]] = []
    started = time.perf_counter()
    while len(turns) < repeats or (len(turns) < _MOST_TURNS and time.perf_counter() - started < _SHORT_S):
        turns.append([contender.step() for contender in contenders])
    return turns


def _tensors(layer: Layer, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return random inputs and output gradients, drawn on the CPU so that they are the same on every device."""
    generator = torch.Generator().manual_seed(_SEED)
    shape = (layer.batch_size, layer.channels, IMAGE_SIZE, IMAGE_SIZE)
    drawn = [torch.randn(shape, generator=generator).to(device, memory_format=torch.channels_last) for _ in range(2)]
    return drawn[0].requires_grad_(), drawn[1] / layer.batch_size


def _settings(case: Case) -> KroneckerSettings:
    return KroneckerSettings(
        structure=Structure.kfac if case.method in TAPS_IN_FEATURES else Structure.sua,
        group_size=case.group_size,
        inverse_method=case.inverse_method,
        # So that the same work is done at every step, and counted as application.
        application=Application.weight,
    )


def _spread(seconds: Sequence[float]) -> Seconds:
    return Seconds(statistics.median(seconds), min(seconds), max(seconds))
