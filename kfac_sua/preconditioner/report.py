"""Which layers are preconditioned, how, and at what cost: the table that a user reads before a long run."""

import math
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from kfac_sua.preconditioner.distributed.assignment import Work, machine_balance, plan_assignment
from kfac_sua.preconditioner.distributed.averaging import DESCRIPTION_BYTES
from kfac_sua.preconditioner.distributed.inversion import SharedInversion
from kfac_sua.preconditioner.forms import moment_form
from kfac_sua.preconditioner.forms.cost import ANY_ROWS
from kfac_sua.preconditioner.geometry import BlockLayout
from kfac_sua.preconditioner.large import large_layers
from kfac_sua.preconditioner.layer import PreconditionedLayer
from kfac_sua.preconditioner.model.discovery import DiscoveredLayer, names_by_reason
from kfac_sua.preconditioner.settings import DampingRule, KroneckerSettings


@dataclass(frozen=True)
class LayerReport:
    """One row of the table.

    Args:
        name: The layer's name.
        kind: Class of the module.
        structure: ``K-FAC``, ``SUA``, the name of another structure, or ``plain gradient``.
        activation_blocks: Number and width of the activation factor's blocks; zeros if the structure has none.
        gradient_blocks: Number and width of the gradient factor's blocks; zeros if the structure has none.
        memory_bytes: Inverses kept, and running averages of factors if there are any, in float32, if dense.
        inverse_flops: FLOPs of a refresh's inversions, if dense.
        apply_flops: FLOPs of one application, if dense.
        low_rank_rows: Rows up to which the activation and the gradient factor are inverted by the Woodbury identity.
        forms: The forms in which the inverses of both are applied; before the first refresh, those of dense factors.
        backward_rows: Rows of a mini-batch below which each is applied in the backward pass; 0 for never.
        reason: Why the layer is left to the plain gradient; empty otherwise.
    """

    name: str
    kind: str
    structure: str
    activation_blocks: tuple[int, int] = (0, 0)
    gradient_blocks: tuple[int, int] = (0, 0)
    memory_bytes: int = 0
    inverse_flops: int = 0
    apply_flops: int = 0
    low_rank_rows: tuple[int, int] = (0, 0)
    forms: tuple[str, str] = ("", "")
    backward_rows: tuple[int, int] = (0, 0)
    reason: str = ""

    @property
    def two_sided_rows(self) -> tuple[int, int]:
        """Former name of :attr:`backward_rows`."""
        return self.backward_rows


@dataclass(frozen=True)
class SharingReport:
    """How inverses are shared out among processes, and the cost.

    Args:
        num_processes: Processes that share a mini-batch.
        is_estimate: Whether the figures are those of dense factors, as before the first refresh.
        num_shared: Blocks that one process inverts for all.
        num_everywhere: Blocks that every process inverts.
        flops: FLOPs of a refresh's inversions on the process with the most.
        flops_alone: FLOPs of a single process that inverts everything.
        refresh_bytes: Bytes that each process hands to the network at a refresh: its inverses.
        statistics_bytes: Bytes that each process hands to the network per measurement of the statistics.
    """

    num_processes: int
    is_estimate: bool
    num_shared: int
    num_everywhere: int
    flops: int
    flops_alone: int
    refresh_bytes: int
    statistics_bytes: int

    def __str__(self) -> str:
        counted = "if dense" if self.is_estimate else "at the last refresh"
        flops, alone = self.flops / 1e9, self.flops_alone / 1e9
        return (
            f"{self.num_processes} processes, {counted}: {self.num_shared} blocks shared out, {self.num_everywhere} "
            f"inverted by every process, {flops:.3f} GFLOP per process ({alone:.3f} alone)\n"
            f"each process sends {self.refresh_bytes / 2**20:.3f} MiB per refresh and "
            f"{self.statistics_bytes / 2**20:.3f} MiB per measurement of the statistics"
        )


@dataclass(frozen=True)
class LayerTable:
    """The layers of a model; ``str()`` gives the printable table, :meth:`summary` three lines.

    Args:
        rows: One per layer.
        chosen_by: The rates by which forms are chosen.
        sharing: What the processes share; ``None`` for a single process.
        large: Warning of layers that are large for their device (see ``large.py``); empty if none is.
    """

    rows: tuple[LayerReport, ...]
    chosen_by: str = ""
    sharing: SharingReport | None = None
    large: str = ""

    def summary(self) -> str:
        """Return three lines: the number of layers of each structure, their cost, and what is left out."""
        treated = [row for row in self.rows if not row.reason]
        structures = Counter(row.structure for row in treated)
        left = names_by_reason((row.name, row.reason) for row in self.rows)
        counted = ", ".join(f"{count} {structure}" for structure, count in structures.items())
        lines = [
            f"{len(treated)} layers preconditioned ({counted})" if treated else "no layer preconditioned",
            f"inverses {_mib(sum(row.memory_bytes for row in treated)).strip()} MiB, refresh "
            f"{_gflop(sum(row.inverse_flops for row in treated)).strip()} GFLOP, application "
            f"{_gflop(sum(row.apply_flops for row in treated)).strip()} GFLOP, if dense",
            f"plain gradient: {', '.join(f'{len(names)} x {reason}' for reason, names in left.items()) or 'none'}",
        ]
        return "\n".join([*lines, f"large: {self.large}"] if self.large else lines)

    def __str__(self) -> str:
        treated = [row for row in self.rows if not row.reason]
        total = ["total", "", "", "", *_costs(treated)]
        sizes = []
        for row in treated:
            sides = row.activation_blocks, row.gradient_blocks
            blocks = [f"{count}x{width}^2" if count else "-" for count, width in sides]
            sizes.append([_name(row), row.structure, *blocks, *_costs([row])])
        lines = [*_aligned([_SIZES, *sizes, total], num_left=2)]
        if treated:
            lines += ["", "of activation and gradient each:", *_aligned([_WAYS, *map(_ways, treated)], num_left=4), ""]
        if self.chosen_by:
            lines.append(f"forms chosen by: {self.chosen_by}")
        if self.large:
            lines.append(f"large: {self.large}")
        by_reason = names_by_reason((row.name, row.reason) for row in self.rows)
        lines += [f"plain gradient ({reason}): {', '.join(names)}" for reason, names in by_reason.items()]
        lines += [] if self.sharing is None else str(self.sharing).splitlines()
        return "\n".join(_wrapped(line) for line in lines)


def layer_table(
    discovered: Sequence[DiscoveredLayer], layers: Mapping[str, PreconditionedLayer], settings: KroneckerSettings
) -> LayerTable:
    """Return a row for every discovered layer."""
    rows = tuple(
        _report(layers[layer.name])
        if layer.name in layers
        else LayerReport(layer.name, type(layer.module).__name__, "plain gradient", reason=layer.reason)
        for layer in discovered
    )
    costs = [cost for layer in layers.values() for cost in layer.structure.side_costs or ()]
    sources = dict.fromkeys(cost.rates.source for cost in costs)
    sizes = [(layers[row.name], row.memory_bytes, row.inverse_flops) for row in rows if row.name in layers]
    return LayerTable(rows, "; ".join(sources), large=large_layers(sizes, settings))


def report_sharing(
    shared: SharedInversion, layouts: Sequence[BlockLayout], settings: KroneckerSettings, like: Tensor
) -> SharingReport:
    """Return the figures of the last refresh; before the first, those of dense factors.

    Args:
        shared: The processes' inversion.
        layouts: Block layouts of all layers.
        settings: Damping rule and the like.
        like: A tensor of the factors' precision and device.
    """
    processes, plan = shared.processes, shared.plan
    is_estimate = plan is None or processes.statistics_bytes is None
    statistics_bytes = processes.statistics_bytes or 0
    if is_estimate:
        blocks = [side for layout in layouts for side in (layout.activation_blocks, layout.gradient_blocks)]
        is_exact = settings.damping_rule is DampingRule.exact
        works = [Work.dense(side, like.dtype, is_eigenbasis=is_exact) for side in blocks]
        plan = plan_assignment(works, processes.size, machine_balance(like.device, shared.flops_per_byte))
        numbers = sum(num_blocks * moment_form(width).count_numbers(width) for num_blocks, width in blocks)
        statistics_bytes = len(layouts) * DESCRIPTION_BYTES + numbers * like.itemsize
    assert plan is not None
    return SharingReport(
        processes.size,
        is_estimate,
        plan.num_shared,
        plan.num_everywhere,
        plan.most_flops,
        plan.flops_alone,
        plan.sent_bytes,
        statistics_bytes,
    )


def _report(layer: PreconditionedLayer) -> LayerReport:
    structure = layer.structure_at_hand
    sizes, costs = structure.sizes(), structure.side_costs
    rows = [0, 0]
    if layer.backward_application is not None and costs is not None:
        rows = [max(0, math.ceil(cost.backward_rows)) for cost in costs]
    return LayerReport(
        name=layer.name,
        kind=type(layer.module).__name__,
        structure=structure.label,
        activation_blocks=sizes.activation_blocks,
        gradient_blocks=sizes.gradient_blocks,
        memory_bytes=sizes.memory_bytes,
        inverse_flops=sizes.inverse_flops,
        apply_flops=sizes.apply_flops,
        low_rank_rows=sizes.low_rank_rows,
        forms=sizes.forms if layer.inverse is None else layer.inverse.forms,
        backward_rows=(rows[0], rows[1]),
    )


_WIDTH = 100  # columns: what a terminal beside an editor, a log and an issue show without breaking lines
_SIZES = ["layer", "factor", "activation", "gradient", "MiB", "GF/invert", "GF/apply"]
_WAYS = ["layer", "Woodbury up to rows", "applied as", "in backward below rows"]


def _name(row: LayerReport) -> str:
    return row.name or "(model)"


def _costs(rows: Sequence[LayerReport]) -> list[str]:
    """Return memory, FLOPs of inversion and FLOPs of application of some layers together."""
    inverse, apply = sum(row.inverse_flops for row in rows), sum(row.apply_flops for row in rows)
    return [_mib(sum(row.memory_bytes for row in rows)), _gflop(inverse), _gflop(apply)]


def _ways(row: LayerReport) -> list[str]:
    """Return how both factors of a layer are inverted and applied."""
    rows, backward_application = (", ".join(map(_rows, limits)) for limits in (row.low_rank_rows, row.backward_rows))
    return [_name(row), rows, ", ".join(row.forms), backward_application]


def _aligned(rows: Sequence[Sequence[str]], num_left: int) -> list[str]:
    """Return the lines of a table with its head underlined; the first columns are aligned left, the others right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    head, *lines = [
        "  ".join(
            f"{cell:<{width}}" if index < num_left else f"{cell:>{width}}"
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return [head, "-" * max(map(len, [head, *lines])), *lines]


def _wrapped(line: str) -> str:
    """Return a line, broken between words if it is too long for a terminal."""
    if len(line) <= _WIDTH or line.startswith("-"):
        return line
    return textwrap.fill(line, _WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def _rows(limit: int) -> str:
    return "any" if limit >= ANY_ROWS else str(limit) if limit else "never"


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.2f}"


def _gflop(flops: int) -> str:
    return f"{flops / 1e9:.3f}"
