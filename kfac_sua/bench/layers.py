"""How close to the machine's rate each part of a step runs: counted FLOPs beside measured seconds.

The parts of a whole step are those that ``costs`` measures. A refresh inverts all layers in common calls, so the share
of one layer is measured, and counted, in a network of that layer alone, on the inputs that it has in the whole one.
"""

import copy
import dataclasses
import statistics
import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from kfac_sua.bench.contender import PHASES, Contender
from kfac_sua.bench.costs import TimeCost
from kfac_sua.bench.flops import count_flops
from kfac_sua.bench.progress import Announcer
from kfac_sua.bench.step_kinds import StepKind, make_due, steps_per_period
from kfac_sua.config import Precision
from kfac_sua.preconditioner import FisherType, KroneckerPreconditioner, KroneckerSettings
from kfac_sua.training.precision import compute_logits
from kfac_sua.training.timing import Stopwatch


@dataclasses.dataclass(frozen=True)
class Work:
    """Counted FLOPs, and the seconds that they take."""

    flops: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class StepWork:
    """One kind of step of one setting.

    Args:
        setting: Its name.
        step: ``plain``, ``statistics`` or ``refresh``.
        parts: Phase to its work; of replays the seconds are in ``captured``, the FLOPs in the phases inside.
    """

    setting: str
    step: str
    parts: dict[str, Work]


@dataclasses.dataclass(frozen=True)
class LayerWork:
    """One layer of one setting.

    Args:
        setting: The setting's name.
        layer: The layer's name.
        statistics: Of a refresh.
        inversion: Of a refresh.
        application: Of every step.
    """

    setting: str
    layer: str
    statistics: Work
    inversion: Work
    application: Work


def count_steps(contenders: Mapping[str, Contender], costs: Sequence[TimeCost], announcer: Announcer) -> list[StepWork]:
    """Count every kind of step of contenders that have had their first refresh, beside their measured seconds."""
    works = []
    for (name, contender), cost in zip(contenders.items(), costs, strict=True):
        for kind in contender.steps_per_period:
            announcer.show("FLOPs of steps", name)
            contender.make_due(kind)
            flops = count_flops(contender.step)
            step = getattr(cost, kind.value)
            parts = {part: Work(flops.get(part, 0), seconds) for part, seconds in step.split.items()}
            works.append(StepWork(name, kind.value, parts))
    return works


def measure_layers(
    contenders: Mapping[str, Contender], precision: Precision, rounds: int, announcer: Announcer
) -> list[LayerWork]:
    """Measure every preconditioned layer of every setting by itself.

    Args:
        contenders: Setting to contender, one of them plain SGD, whose network has no hooks.
        precision: In what convolutions and matrix products compute.
        rounds: Steps of each kind per layer, of which medians count.
        announcer: Told of every layer.

    Returns:
        One row per setting and layer.
    """
    plain = next(contender for contender in contenders.values() if contender.preconditioner is None)
    modules = dict(plain.model.named_modules())
    inputs = _layer_inputs(plain)
    works = []
    for setting, contender in contenders.items():
        if contender.preconditioner is None:
            continue
        settings = contender.preconditioner.settings
        for row in contender.preconditioner.describe().rows:
            if row.reason:
                continue
            announcer.show("layers", f"{setting}, {row.name}")
            layer = _LoneLayer(modules[row.name], inputs[row.name], settings, precision)
            works.append(_layer_work(setting, row.name, layer, rounds))
    return works


class _LoneLayer:
    """A network of one layer, with a preconditioner of its own."""

    def __init__(self, module: nn.Module, inputs: Tensor, settings: KroneckerSettings, precision: Precision) -> None:
        self._model = nn.Sequential(copy.deepcopy(module))
        self._inputs = inputs
        self._precision = precision
        # The layer's name in the whole network means nothing here, and its outputs are not logits to draw labels from.
        settings = dataclasses.replace(settings, skip=[], fisher_type=FisherType.empirical)
        self.preconditioner = KroneckerPreconditioner(self._model, settings=settings)
        with self.preconditioner.paused():
            self._output_grad = torch.randn_like(self._forward().detach()) / len(inputs)

    def step(self, watch: Stopwatch) -> None:
        """Do all of a training step but the update."""
        self.preconditioner.phase = watch.phase
        with watch.phase("forward_backward"):
            self._model.zero_grad(set_to_none=True)
            self._forward().backward(self._output_grad)
        with watch.phase("application"):
            self.preconditioner.step()

    def median_seconds(self, kind: StepKind, rounds: int) -> dict[str, float]:
        """Do steps of one kind and return the median seconds of each phase."""
        totals = []
        for _ in range(rounds):
            make_due(self.preconditioner, kind)
            watch = Stopwatch(self._inputs.device, time.process_time)
            self.step(watch)
            totals.append(watch.totals())
        return {phase: statistics.median(times[phase] for times in totals) for phase in PHASES}

    def flops(self, kind: StepKind) -> dict[str, int]:
        """Do a step of one kind and return the FLOPs of each phase."""
        make_due(self.preconditioner, kind)
        return count_flops(self.step)

    def _forward(self) -> Tensor:
        return compute_logits(self._model, self._inputs, self._precision)


def _layer_work(setting: str, name: str, layer: _LoneLayer, rounds: int) -> LayerWork:
    """Measure and count a layer's refresh and, where its period has one, its plain step."""
    layer.median_seconds(StepKind.refresh, 1)  # warm-up, and the first inverse
    refresh_s, refresh_flops = layer.median_seconds(StepKind.refresh, rounds), layer.flops(StepKind.refresh)
    step_s, step_flops = refresh_s, refresh_flops
    if StepKind.plain in steps_per_period(layer.preconditioner):
        step_s, step_flops = layer.median_seconds(StepKind.plain, rounds), layer.flops(StepKind.plain)
    return LayerWork(
        setting=setting,
        layer=name,
        statistics=Work(refresh_flops["statistics"], refresh_s["statistics"]),
        inversion=Work(refresh_flops["inversion"], refresh_s["inversion"]),
        application=Work(step_flops["application"], step_s["application"]),
    )


def _layer_inputs(contender: Contender) -> dict[str, Tensor]:
    """Return the inputs of every layer in a forward pass; they take a gradient where they do in training."""
    inputs: dict[str, Tensor] = {}

    def keep(name: str, tensor: Tensor) -> None:
        inputs[name] = tensor.detach().clone().requires_grad_(tensor.requires_grad)

    handles = [
        module.register_forward_pre_hook(lambda _, args, name=name: keep(name, args[0]))
        for name, module in contender.model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    ]
    try:
        contender.forward()
    finally:
        for handle in handles:
            handle.remove()
    return inputs
