"""What is preconditioned, how, and what it costs: the table a user reads before a long run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kfac_sua.preconditioner.correlations import can_correlate
from kfac_sua.preconditioner.cost import SideCost
from kfac_sua.preconditioner.grouping import BiasBlock, BlockLayout
from kfac_sua.preconditioner.layers import DiscoveredLayer, LayerGeometry, names_by_reason
from kfac_sua.preconditioner.patch_rows import can_be_patch_rows
from kfac_sua.preconditioner.settings import DampingRule, InverseMethod, KroneckerSettings, WeightSharing
from kfac_sua.preconditioner.sharing_report import SharingReport


def activation_cost(geometry: LayerGeometry, layout: BlockLayout, settings: KroneckerSettings) -> SideCost:
    """Return the work on the activation side: a vector per output channel and identity tap."""
    num_blocks, width = layout.activation_blocks
    # A sample of the rows is formed, and multiplied as it is.
    is_whole = settings.weight_sharing is WeightSharing.expand and settings.activation_rows is None
    patch_width = geometry.in_channels if geometry.stride == (1, 1) else width
    return SideCost(
        num_blocks,
        width,
        layout.gradient.num_channels * layout.identity_taps,
        settings.inverse_period,
        correlated_rows=geometry.kernel_size[0] if is_whole and can_correlate(geometry, layout) else 1,
        patch_width=patch_width if is_whole and can_be_patch_rows(geometry, layout) else 0,
    )


def gradient_cost(layout: BlockLayout, settings: KroneckerSettings) -> SideCost:
    """Return the work on the gradient side: a vector per weight that an output channel has."""
    num_blocks, width = layout.gradient_blocks
    vectors = layout.activation.num_channels * layout.num_taps + (layout.bias is BiasBlock.JOINT)
    return SideCost(num_blocks, width, vectors, settings.inverse_period)


def max_low_rank_rows(cost: SideCost, settings: KroneckerSettings) -> int:
    """Return up to how many rows a factor is kept as rows, by ``settings.inverse_method``."""
    if settings.inverse_method is InverseMethod.low_rank:
        return 2**62
    dense_only = settings.inverse_method is InverseMethod.cholesky or settings.needs_dense_factors
    return 0 if dense_only else cost.most_low_rank_rows()


@dataclass(frozen=True)
class LayerReport:
    """One row of the table.

    Args:
        name: The layer's name.
        kind: Class of the module.
        structure: ``K-FAC``, ``SUA`` or ``plain gradient``.
        activation_blocks: Number and width of the activation factor's blocks.
        gradient_blocks: Number and width of the gradient factor's blocks.
        memory_bytes: Inverses kept, and running averages of factors if there are any, in float32, if dense.
        inverse_flops: FLOPs of a refresh's inversions, if dense.
        apply_flops: FLOPs of one application, if dense.
        low_rank_rows: Rows up to which the activation and the gradient factor are inverted by the Woodbury identity.
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
    reason: str = ""


@dataclass(frozen=True)
class LayerTable:
    """The layers of a model; ``str()`` gives the printable table.

    Args:
        rows: One per layer.
        sharing: What is shared with other processes; ``None`` without any.
    """

    rows: tuple[LayerReport, ...]
    sharing: SharingReport | None = None

    def __str__(self) -> str:
        lines = [_HEADER, "-" * len(_HEADER)]
        treated = [row for row in self.rows if not row.reason]
        lines += [_format(row) for row in treated]
        lines.append(
            f"{'total':<{_NAME_WIDTH}} {'':<7} {'':>10} {'':>10} {_mib(sum(r.memory_bytes for r in treated)):>9} "
            f"{_gflop(sum(r.inverse_flops for r in treated)):>9} {_gflop(sum(r.apply_flops for r in treated)):>9}"
        )
        by_reason = names_by_reason((row.name, row.reason) for row in self.rows)
        lines += [f"plain gradient ({reason}): {', '.join(names)}" for reason, names in by_reason.items()]
        return "\n".join(lines if self.sharing is None else [*lines, str(self.sharing)])


def layer_table(
    discovered: Sequence[DiscoveredLayer], layouts: Mapping[str, BlockLayout], settings: KroneckerSettings
) -> LayerTable:
    """Return a row for every discovered layer."""
    return LayerTable(
        tuple(
            _report(layer, layouts[layer.name], settings)
            if layer.name in layouts
            else LayerReport(layer.name, type(layer.module).__name__, "plain gradient", reason=layer.reason)
            for layer in discovered
        )
    )


def _report(layer: DiscoveredLayer, layout: BlockLayout, settings: KroneckerSettings) -> LayerReport:
    assert layer.geometry is not None
    costs = activation_cost(layer.geometry, layout, settings), gradient_cost(layout, settings)
    is_exact = settings.damping_rule is DampingRule.exact
    copies = 2 if settings.ema_decay > 0 else 1
    return LayerReport(
        name=layer.name,
        kind=type(layer.module).__name__,
        structure="K-FAC" if layout.taps_in_features else "SUA",
        activation_blocks=layout.activation_blocks,
        gradient_blocks=layout.gradient_blocks,
        memory_bytes=sum(4 * copies * cost.num_blocks * cost.width**2 for cost in costs),
        inverse_flops=sum(cost.eigenbasis() if is_exact else cost.dense_inverse() for cost in costs),
        apply_flops=(2 if is_exact else 1) * sum(cost.dense_apply() for cost in costs),
        low_rank_rows=(max_low_rank_rows(costs[0], settings), max_low_rank_rows(costs[1], settings)),
    )


_NAME_WIDTH = 28
_HEADER = (
    f"{'layer':<{_NAME_WIDTH}} {'factor':<7} {'activation':>10} {'gradient':>10} {'MiB':>9} {'GF/invert':>9} "
    f"{'GF/apply':>9}  Woodbury up to rows (activation, gradient)"
)


def _format(row: LayerReport) -> str:
    rows = ", ".join(_rows(limit) for limit in row.low_rank_rows)
    return (
        f"{row.name or '(model)':<{_NAME_WIDTH}} {row.structure:<7} {_blocks(row.activation_blocks):>10} "
        f"{_blocks(row.gradient_blocks):>10} {_mib(row.memory_bytes):>9} {_gflop(row.inverse_flops):>9} "
        f"{_gflop(row.apply_flops):>9}  {rows}"
    )


def _rows(limit: int) -> str:
    return "any" if limit >= 2**62 else str(limit) if limit else "never"


def _blocks(blocks: tuple[int, int]) -> str:
    return f"{blocks[0]}×{blocks[1]}²"


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.2f}"


def _gflop(flops: int) -> str:
    return f"{flops / 1e9:.3f}"
