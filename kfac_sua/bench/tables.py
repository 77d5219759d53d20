"""The tables that a measurement prints."""

from collections.abc import Sequence

from kfac_sua.bench.against import Change
from kfac_sua.bench.arithmetic import Arithmetic
from kfac_sua.bench.compiled import COMPILED
from kfac_sua.bench.contender import CAPTURED, PHASES
from kfac_sua.bench.costs import Spread, StepCost
from kfac_sua.bench.layers import LayerWork, StepWork, Work
from kfac_sua.bench.rates import Rate, best_gemm_rate
from kfac_sua.bench.record import Arguments, BenchRecord, Cost
from kfac_sua.bench.step_kinds import StepKind

NOTHING = "–"
HEADINGS = {"forward_backward": "forward/backward"}


def costs_table(record: BenchRecord) -> str:
    """Return time per setting: each kind of step and the mean of a refresh period, over plain SGD's step."""
    plain_sgd = record.costs[0].time.plain
    assert plain_sgd is not None
    title = f"Time over plain SGD's step of {plain_sgd.seconds.median:.4f} s; {_conditions(record.arguments)}"
    has_statistics = any(cost.time.statistics for cost in record.costs)
    has_replays = record.arguments.device == "cuda" or any(cost.is_captured for cost in record.costs)
    header = ["setting", "plain", *(["statistics"] if has_statistics else []), "refresh", "amortised"]
    header += ["plain steps"] if has_replays else []
    rows = []
    for cost in record.costs:
        kinds = [cost.time.plain, *([cost.time.statistics] if has_statistics else []), cost.time.refresh]
        ratios = [NOTHING if step is None else _ratio(step.ratio) for step in kinds]
        capture = [_how_plain_steps_run(cost)] if has_replays else []
        rows.append([cost.setting, *ratios, _ratio(cost.time.amortised_ratio), *capture])
    notes = [f"{COMPILED}  cannot be measured: {record.why_not_compiled}."] if record.why_not_compiled else []
    if has_replays:
        eager = [cost for cost in record.costs if not cost.is_captured and cost.setting != COMPILED]
        notes += [f"{cost.setting} is not captured: {cost.why_eager}." for cost in eager]
    return "\n".join([table(title, header, rows), *notes])


def split_table(costs: Sequence[Cost]) -> str:
    """Return where the seconds of each kind of step go."""
    steps = [(cost, kind, step) for cost in costs for kind in StepKind if (step := _step(cost, kind)) is not None]
    phases = (*PHASES, CAPTURED) if any(CAPTURED in step.split for _, _, step in steps) else PHASES
    rows = [
        [cost.setting, kind.value, f"{step.seconds.median:.4f}", *(_part(step.split.get(p, 0.0)) for p in phases)]
        for cost, kind, step in steps
    ]
    return table("Seconds of a step", ["setting", "step", "total", *(HEADINGS.get(p, p) for p in phases)], rows)


def memory_table(costs: Sequence[Cost]) -> str:
    """Return peak memory per setting."""
    rows = [[cost.setting, f"{cost.memory.peak_bytes / 2**20:.2f}", f"{cost.memory.ratio:.3f}×"] for cost in costs]
    return table("Peak memory of construction, refresh and plain steps", ["setting", "MiB", "ratio"], rows)


def operations_table(costs: Sequence[Cost]) -> str:
    """Return the operations of eager steps, and those beyond plain SGD's."""
    plain_sgd = costs[0].operations.get(StepKind.plain.value)
    rows = [
        [cost.setting, kind, str(own.launches), str(own.views), beyond, str(own.waits)]
        for cost in costs
        for kind, own in cost.operations.items()
        for beyond in [NOTHING if plain_sgd is None else str(own.launches - plain_sgd.launches)]
    ]
    title = "Operations of an eager step: each on numbers is a launch on a GPU, views take the host's time"
    return table(title, ["setting", "step", "launches", "views", "beyond SGD", "waits"], rows)


def rates_table(rates: Sequence[Rate]) -> str:
    """Return the rates of the machine."""
    rows = [
        [rate.operation.replace("_", " "), "×".join(map(str, rate.shape)), rate.dtype, f"{rate.gflop_per_s:.1f}"]
        for rate in rates
    ]
    return table("Machine rates", ["operation", "shape", "dtype", "GF/s"], rows)


def steps_table(works: Sequence[StepWork], rates: Sequence[Rate], arithmetic: Arithmetic) -> str:
    """Return, for every part of a step, its FLOPs, its seconds at the machine's rate, and its measured seconds."""
    rows = []
    for work in works:
        parts = {phase: part for phase, part in work.parts.items() if part.flops or part.seconds}
        parts["whole step"] = Work(sum(p.flops for p in parts.values()), sum(p.seconds for p in parts.values()))
        floor = sum(_floor(part.flops, rates, arithmetic.format_of(name)) for name, part in work.parts.items())
        for name, part in parts.items():
            least = floor if name == "whole step" else _floor(part.flops, rates, arithmetic.format_of(name))
            rows.append([work.setting, work.step, HEADINGS.get(name, name), *_work_cells(part, least)])
    title = "Work of a step; the floor is its FLOPs at the fastest measured rate of matrix products"
    return table(title, ["setting", "step", "part", "MFLOP", "floor ms", "measured ms", "measured/floor"], rows)


def layers_table(works: Sequence[LayerWork], rates: Sequence[Rate], arithmetic: Arithmetic) -> str:
    """Return the work on every preconditioned layer, measured on the layer alone."""
    rows = []
    for work in works:
        parts = {"statistics": work.statistics, "inversion": work.inversion, "application": work.application}
        for name, part in parts.items():
            least = _floor(part.flops, rates, arithmetic.format_of(name))
            rows.append([work.setting, work.layer, name, *_work_cells(part, least)])
    title = "Work on each layer, measured on the layer alone"
    return table(title, ["setting", "layer", "part", "MFLOP", "floor ms", "measured ms", "measured/floor"], rows)


def changes_table(changes: Sequence[Change], tolerance: float) -> str:
    """Return amortised ratios then and now, with a mark on what got slower by more than the tolerance."""
    rows = [
        [
            change.setting,
            f"{change.old:.3f}×",
            f"{change.new:.3f}×",
            f"{100 * change.relative:+.1f} %",
            "slower" if change.relative > tolerance else "",
        ]
        for change in changes
    ]
    return table(f"Amortised ratio, tolerance {100 * tolerance:g} %", ["setting", "then", "now", "change", ""], rows)


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return aligned text: first column to the left, the others to the right.

    Args:
        title: Line above.
        header: Heading of every column.
        rows: Cells.
    """
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [title]
    for row in [header, *rows]:
        others = [f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join([f"{row[0]:<{widths[0]}}", *others]).rstrip())
    return "\n".join(lines)


def _conditions(arguments: Arguments) -> str:
    threads = f"{arguments.num_threads} thread{'s' if arguments.num_threads > 1 else ''}"
    where = f"cpu, {threads}, process CPU time" if arguments.device == "cpu" else f"{arguments.device}, wall time"
    return (
        f"{arguments.model} width {arguments.width:g}, batch {arguments.batch_size}, refresh every {arguments.period}, "
        f"{arguments.precision}, {where}"
    )


def _step(cost: Cost, kind: StepKind) -> StepCost | None:
    return {
        StepKind.plain: cost.time.plain,
        StepKind.statistics: cost.time.statistics,
        StepKind.refresh: cost.time.refresh,
    }[kind]


def _how_plain_steps_run(cost: Cost) -> str:
    if cost.setting == COMPILED:
        return COMPILED
    return "replayed" if cost.is_captured else "eager"


def _ratio(spread: Spread) -> str:
    """Return the median with the least and the largest, where they differ."""
    text = f"{spread.median:.3f}×"
    return text if spread.low == spread.high else f"{text} ({spread.low:.3f} to {spread.high:.3f})"


def _part(seconds: float) -> str:
    return f"{seconds:.4f}" if seconds else NOTHING


def _floor(flops: int, rates: Sequence[Rate], dtype: str) -> float:
    return flops / best_gemm_rate(rates, dtype)


def _work_cells(work: Work, floor: float) -> list[str]:
    """Return FLOPs, floor, seconds and their ratio; a part of a replay has no seconds of its own."""
    far = f"{work.seconds / floor:.1f}×" if floor and work.seconds else NOTHING
    milliseconds = f"{1e3 * work.seconds:,.2f}" if work.seconds else NOTHING
    return [f"{work.flops / 1e6:,.1f}", f"{1e3 * floor:,.2f}", milliseconds, far]
