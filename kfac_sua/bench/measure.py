"""One measurement from start to end."""

import dataclasses
from collections.abc import Mapping, Sequence

import torch

from kfac_sua.bench.arithmetic import Arithmetic
from kfac_sua.bench.compiled import COMPILED, CompiledContender
from kfac_sua.bench.contender import Batch, Contender
from kfac_sua.bench.costs import Rounds, TimeCost, measure_costs
from kfac_sua.bench.layers import LayerWork, StepWork, count_steps, measure_layers
from kfac_sua.bench.memory import peak_bytes
from kfac_sua.bench.operations import Operations, count_operations
from kfac_sua.bench.progress import Announcer
from kfac_sua.bench.rates import measure_rates
from kfac_sua.bench.record import Arguments, BenchRecord, Cost, Memory
from kfac_sua.bench.settings import Setting
from kfac_sua.bench.step_kinds import StepKind
from kfac_sua.runs.environment import environment

# The second refresh needs the most memory, since it holds the old inverses beside the new ones.
MEMORY_STEPS = (StepKind.refresh, StepKind.plain, StepKind.plain, StepKind.refresh, StepKind.plain)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is to be measured.

    Args:
        settings: Plain SGD first.
        arguments: Conditions and amounts.
        with_layers: Whether to measure every layer by itself too.
        with_compiled: Whether to measure plain SGD through ``torch.compile`` too.
    """

    settings: Sequence[Setting]
    arguments: Arguments
    with_layers: bool
    with_compiled: bool

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
    with plan.arithmetic.computing(plan.settings[0].config):  # all settings share what it says of this
        return _measure(plan, Announcer())


def _measure(plan: Plan, announcer: Announcer) -> BenchRecord:
    arguments, arithmetic = plan.arguments, plan.arithmetic
    batch = Batch.random(arguments.batch_size, arithmetic)
    contenders = {one.name: Contender(one.config, arithmetic, batch) for one in plan.settings}
    rates = measure_rates(arithmetic, announcer)
    rounds = Rounds(arguments.rounds, arguments.refresh_rounds, arguments.repeats)
    # Before others capture: recording its graphs, torch.compile frees workspaces that theirs would go on using.
    why_not_compiled = _add_compiled(contenders, plan, batch, announcer) if plan.with_compiled else ""
    times = measure_costs(contenders, rounds, announcer)
    steps, layers = _count_and_measure(contenders, times, plan, announcer) if plan.with_layers else ([], [])
    operations = {name: _operations(name, one, announcer) for name, one in contenders.items()}
    captures = {name: (one.is_captured, one.why_eager) for name, one in contenders.items()}
    contenders.clear()  # frees their memory
    # After the timing, which fills caches that all settings share.
    configs = {**{one.name: one.config for one in plan.settings}, COMPILED: plan.settings[0].config}
    memory = [_peak(Setting(name, configs[name]), arithmetic, batch, announcer) for name in captures]
    announcer.clear()
    costs = [
        Cost(name, time, Memory(peak, peak / memory[0]), *capture, operations[name])
        for (name, capture), time, peak in zip(captures.items(), times, memory, strict=True)
    ]
    return BenchRecord(arguments, environment(arguments.device), rates, costs, steps, layers, why_not_compiled)


def _add_compiled(contenders: dict[str, Contender], plan: Plan, batch: Batch, announcer: Announcer) -> str:
    """Let compiled SGD take part, or return why it cannot."""
    announcer.show("compilation")
    compiled = CompiledContender(plan.settings[0].config, plan.arithmetic, batch)
    reason = compiled.try_warm_up()
    if not reason:
        contenders[COMPILED] = compiled
    return reason


def _count_and_measure(
    contenders: Mapping[str, Contender], times: Sequence[TimeCost], plan: Plan, announcer: Announcer
) -> tuple[list[StepWork], list[LayerWork]]:
    """Return the work of steps and of layers; FLOPs are counted by operator, which excludes a compiled network."""
    own = {setting.name: contenders[setting.name] for setting in plan.settings}
    steps = count_steps(own, times[: len(own)], announcer)
    return steps, measure_layers(own, plan.arithmetic.precision, plan.arguments.refresh_rounds, announcer)


def _operations(name: str, contender: Contender, announcer: Announcer) -> dict[str, Operations]:
    """Return the operations of a setting's steps; none for a compiled network, whose operators are others."""
    announcer.show("operations", name)
    return {} if name == COMPILED else count_operations(contender)


def _peak(setting: Setting, arithmetic: Arithmetic, batch: Batch, announcer: Announcer) -> int:
    """Return the most memory that construction and a few steps of one setting alone hold at once."""
    announcer.show("memory", setting.name)

    def train() -> None:
        is_compiled = setting.name == COMPILED
        contender = (CompiledContender if is_compiled else Contender)(setting.config, arithmetic, batch)
        if is_compiled or contender.is_capturing:
            contender.warm_up()  # eagerly, with a capture, replays, and refreshes in its memory
        for kind in MEMORY_STEPS:
            if kind in contender.steps_per_period:
                contender.make_due(kind)
                contender.timed_step()

    return peak_bytes(train, arithmetic.device)
