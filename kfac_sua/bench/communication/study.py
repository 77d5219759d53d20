"""Seconds of a mini-batch on a cluster, by arithmetic: counted FLOPs and bytes over stated rates and bandwidths."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

import pandas as pd

from kfac_sua.bench.communication.cluster import Cluster
from kfac_sua.bench.communication.counted import Costs, ShapeModel, count_costs
from kfac_sua.bench.communication.work import Work
from kfac_sua.bench.settings import Setting, compose_settings, parse_items
from kfac_sua.preconditioner.distributed.assignment import FLOPS_PER_BYTE

PARTS = ("statistics", "statistics_exchange", "inversion", "inversion_exchange", "application")
"""Parts that preconditioning adds to a mini-batch of SGD, in seconds, averaged over a refresh period."""

MOST_OVERHEAD = 0.05
"""Overheads below this share of SGD count as small."""

_PAPER = {"vgg11": {"period": 50, "group_size": 32}, "preact_resnet50": {"period": 64, "group_size": 64}}
METHODS = ("kfac", "sua", "grouped", "sua_grouped")


@dataclass(frozen=True)
class Flops:
    """FLOPs of one process.

    Args:
        training: Forward and backward pass.
        statistics: A measurement of the statistics.
        application: An application of the inverses.
    """

    training: int
    statistics: int
    application: int


@dataclass(frozen=True)
class StepSeconds:
    """Seconds of a mini-batch.

    Args:
        sgd: Forward pass, backward pass and the gradients' sum, which hides behind the backward pass if it can.
        parts: Seconds of ``PARTS``, averaged over a refresh period.
    """

    sgd: float
    parts: dict[str, float]

    @property
    def overhead(self) -> float:
        """What the preconditioner adds, as a share of SGD's mini-batch."""
        return sum(self.parts.values()) / self.sgd


def step_seconds(costs: Costs, flops: Flops, cluster: Cluster) -> StepSeconds:
    """Return the seconds of a mini-batch.

    Nothing of the preconditioner hides behind anything else; a backward pass takes two thirds of a training step.

    Args:
        costs: What a process sends and inverts.
        flops: What else it computes.
        cluster: Rates and bandwidths.
    """
    size = costs.num_processes
    training = flops.training / cluster.training_flops
    sgd = training / 3 + max(2 / 3 * training, cluster.sum_s(costs.gradient_bytes, size))
    exchange = cluster.gather_s(costs.header_bytes, size) + cluster.gather_s(costs.rows_bytes, size)
    exchange += cluster.sum_s(costs.moments_bytes, size)
    collective = cluster.sum_s if costs.inverses_are_summed else cluster.gather_s
    parts = {
        "statistics": flops.statistics / cluster.product_flops / costs.factor_period,
        "statistics_exchange": exchange / costs.factor_period,
        "inversion": costs.inversion_flops / cluster.inversion_flops / costs.inverse_period,
        "inversion_exchange": collective(costs.inverse_bytes, size) / costs.inverse_period,
        "application": flops.application / cluster.product_flops,
    }
    return StepSeconds(sgd, parts)


def paper_settings(model: str) -> list[Setting]:
    """Return the four structures with the paper's periods and group sizes."""
    paper = _PAPER[model]
    items = [name if "grouped" not in name else f"{name}:group_size={paper['group_size']}" for name in METHODS]
    values = {"model": model, "device": "cpu", "preconditioner.inverse_period": paper["period"]}
    return compose_settings(parse_items(items), [], values)[1:]


def study_rows(
    model: str, sizes: Sequence[int], batch_per_process: int, global_batch: int, cluster: Cluster
) -> Iterable[dict[str, object]]:
    """Yield a row per scaling, structure and number of processes.

    Args:
        model: ``vgg11`` or ``preact_resnet50``.
        sizes: Numbers of processes.
        batch_per_process: Examples of each under weak scaling.
        global_batch: Examples of all together under strong scaling, a multiple of every size.
        cluster: Rates and bandwidths.
    """
    for method, setting in zip(METHODS, paper_settings(model), strict=True):
        shapes = ShapeModel(setting.config)
        work = Work(shapes)
        for scaling in ("weak", "strong"):
            for size in sizes:
                batch_size = batch_per_process * size if scaling == "weak" else global_batch
                costs = count_costs(method, shapes, size, batch_size, FLOPS_PER_BYTE["cuda"])
                own = -(-batch_size // size)
                flops = Flops(work.training(own), work.statistics(own), work.application(own, costs))
                yield study_row(model, scaling, own, costs, flops, cluster)


def study_row(
    model: str, scaling: str, batch_per_process: int, costs: Costs, flops: Flops, cluster: Cluster
) -> dict[str, object]:
    """Return a row of the table: what was counted, and the seconds that follow."""
    seconds = step_seconds(costs, flops, cluster)
    counted = {key: value for key, value in asdict(costs).items() if key not in ("setting", "batch_size")}
    return {
        "model": model,
        "scaling": scaling,
        "method": costs.setting,
        "batch_per_process": batch_per_process,
        "sgd_s": seconds.sgd,
        **{f"{part}_s": value for part, value in seconds.parts.items()},
        "overhead": seconds.overhead,
        **counted,
        "training_flops": flops.training,
        "statistics_flops": flops.statistics,
        "application_flops": flops.application,
    }


def study_frame(
    models: Sequence[str], sizes: Sequence[int], batch_per_process: int, global_batch: int, cluster: Cluster
) -> pd.DataFrame:
    """Return the table of the study; see :func:`study_rows`."""
    rows = [row for model in models for row in study_rows(model, sizes, batch_per_process, global_batch, cluster)]
    return pd.DataFrame(rows)
