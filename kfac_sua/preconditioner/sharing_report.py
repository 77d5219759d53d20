"""What processes that share a mini-batch do together, and what it costs: the lines under the table of layers."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from kfac_sua.preconditioner.exchange import SharedInversion
from kfac_sua.preconditioner.grouping import BlockLayout
from kfac_sua.preconditioner.processes import DESCRIPTION_BYTES
from kfac_sua.preconditioner.settings import DampingRule, KroneckerSettings
from kfac_sua.preconditioner.sharing import Work, machine_balance, plan_sharing
from kfac_sua.preconditioner.triangles import triangle_numbers


@dataclass(frozen=True)
class SharingReport:
    """Choice and cost of sharing out inverses.

    Args:
        num_processes: Processes that share a mini-batch.
        is_estimate: Whether dense factors are counted, as before the first refresh, instead of what was carried out.
        num_shared: Blocks that one process inverts for all.
        num_everywhere: Blocks that every process inverts.
        flops: FLOPs of a refresh's inversions, of the process with most of them.
        flops_alone: The same of a single process.
        refresh_bytes: Bytes that each process hands to the network at a refresh: its inverses.
        statistics_bytes: The same per measurement of the statistics.
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


def report_sharing(
    shared: SharedInversion, layouts: Sequence[BlockLayout], settings: KroneckerSettings, like: Tensor
) -> SharingReport:
    """Return what was carried out at the last refresh, or before the first what dense factors would give.

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
        plan = plan_sharing(works, processes.size, machine_balance(like.device, shared.flops_per_byte))
        numbers = sum(num_blocks * triangle_numbers(width) for num_blocks, width in blocks)
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
