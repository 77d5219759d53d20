"""One measurement from start to end."""

import dataclasses
from collections.abc import Sequence

import torch

from kfac_sua.bench.arithmetic import Arithmetic
from kfac_sua.bench.contender import Batch, Contender
from kfac_sua.bench.costs import Rounds, measure_costs
from kfac_sua.bench.layers import LayerWork, StepWork, count_steps, measure_layers
from kfac_sua.bench.memory import peak_bytes
from kfac_sua.bench.progress import Announcer
from kfac_sua.bench.rates import measure_rates
from kfac_sua.bench.record import Arguments, BenchRecord, Cost, Memory
from kfac_sua.bench.settings import Setting
from kfac_sua.bench.step_kinds import StepKind
from kfac_sua.runs.environment import environment

# The first step of a setting refreshes; the second refresh, with inverses at hand, is the one that needs most.
MEMORY_STEPS = (StepKind.refresh, StepKind.plain, StepKind.plain, StepKind.refresh, StepKind.plain)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is to be measured.

    Args:
        settings: Plain SGD first.
        arguments: Conditions and amounts.
        with_layers: Whether to measure every layer by itself too.
    """

    settings: Sequence[Setting]
    arguments: Arguments
    with_layers: bool

    @property
    def arithmetic(self) -> Arithmetic:
        """The number formats of training, and where it computes."""
        return Arithmetic(self.arguments.precision, torch.device(self.arguments.device))


def carry_out(plan: Plan) -> BenchRecord:
    """Measure everything that a plan asks for.

    Args:
        plan: What is to be measured.

    Returns:
        The measurement.

    Raises:
        ConfigError: If a preconditioner's settings do not fit the network.
        RuntimeError: If a setting cannot be carried out, as when memory runs out.
    """
    torch.set_num_threads(plan.arguments.num_threads)
    with plan.arithmetic.computing():
        return _measure(plan, Announcer())


def _measure(plan: Plan, announcer: Announcer) -> BenchRecord:
    arguments, arithmetic = plan.arguments, plan.arithmetic
    batch = Batch.random(arguments.batch_size, arithmetic)
    contenders = {one.name: Contender(one.config, arithmetic, batch) for one in plan.settings}
    rates = measure_rates(arithmetic, announcer)
    rounds = Rounds(arguments.rounds, arguments.refresh_rounds, arguments.repeats)
    times = measure_costs(contenders, rounds, announcer)
    steps: list[StepWork] = []
    layers: list[LayerWork] = []
    if plan.with_layers:
        steps = count_steps(contenders, times, announcer)
        layers = measure_layers(contenders, arithmetic.precision, rounds.refresh, announcer)
    captures = [(one.is_captured, one.why_eager) for one in contenders.values()]
    contenders.clear()  # their memory is another's now
    # After the timing, which fills caches that all settings share.
    memory = [_peak(one, arithmetic, batch, announcer) for one in plan.settings]
    announcer.clear()
    costs = [
        Cost(setting.name, time, Memory(peak, peak / memory[0]), *capture)
        for setting, time, peak, capture in zip(plan.settings, times, memory, captures, strict=True)
    ]
    return BenchRecord(arguments, environment(arguments.device), rates, costs, steps, layers)


def _peak(setting: Setting, arithmetic: Arithmetic, batch: Batch, announcer: Announcer) -> int:
    """Return the most memory that construction and a few steps of one setting alone hold at once."""
    announcer.show("memory", setting.name)

    def train() -> None:
        contender = Contender(setting.config, arithmetic, batch)
        if contender.is_capturing:
            contender.warm_up()  # eagerly, with a capture, replays, and refreshes in its memory
        for kind in MEMORY_STEPS:
            if kind in contender.steps_per_period:
                contender.make_due(kind)
                contender.timed_step()

    return peak_bytes(train, arithmetic.device)
