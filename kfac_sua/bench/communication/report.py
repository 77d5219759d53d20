"""The counted and the measured costs as one table for programs and as Markdown for readers."""

from collections.abc import Sequence
from dataclasses import asdict

import pandas as pd

from kfac_sua.bench.communication.counted import Costs
from kfac_sua.bench.communication.measured import Measurement
from kfac_sua.markdown import NOTHING, bullets, code_block, join, listed, number, table
from kfac_sua.runs.environment import Environment

AGREEING = ("header_bytes", "rows_bytes", "moments_bytes", "inverse_bytes", "gradient_bytes", "kept_bytes")
"""Columns that are both counted and measured, and must agree."""

_MIB = 2**20
_KEYS = ["setting", "num_processes", "batch_size"]


def to_frame(costs: Sequence[Costs], measurements: Sequence[Measurement]) -> pd.DataFrame:
    """Return a row per setting and number of processes.

    Args:
        costs: Counted.
        measurements: Measured, of some of these.

    Returns:
        Counted columns, and ``measured_*`` columns, empty where nothing was measured; seconds with their phase.
    """
    counted = pd.DataFrame(
        [
            asdict(one)
            | {"statistics_bytes": one.statistics_bytes, "bytes_per_step": one.bytes_per_step}
            | {"received_per_step": one.received_per_step, "gradients_received_per_step": one.gradients_received}
            for one in costs
        ]
    )
    if not measurements:
        return counted
    measured = pd.DataFrame([_flat(one) for one in measurements])
    return counted.merge(measured, on=_KEYS, how="left")


def disagreements(costs: Sequence[Costs], measurements: Sequence[Measurement]) -> list[str]:
    """Return a sentence for every number that was counted and measured differently."""
    counted = {(one.setting, one.num_processes, one.batch_size): one for one in costs}
    sentences = []
    for one in measurements:
        other = counted[one.setting, one.num_processes, one.batch_size]
        for name in AGREEING:
            if getattr(one, name) != getattr(other, name):
                sentences.append(
                    f"{one.setting}, {one.num_processes} processes: {name} was counted as {getattr(other, name)}, "
                    f"measured as {getattr(one, name)}."
                )
    return sentences


def describe_costs(
    costs: Sequence[Costs], measurements: Sequence[Measurement], model: str, command: str, machine: Environment
) -> str:
    """Return the Markdown.

    Args:
        costs: Counted.
        measurements: Measured, of some of these.
        model: What the network is, such as ``vgg11, width 1``.
        command: The command line that gave these numbers.
        machine: What was measured on.
    """
    blocks = [f"# What processes send each other: {model}", code_block([command]), _legend(costs), _counted(costs)]
    if measurements:
        blocks += ["## Measured", _measured_legend(costs, measurements, machine), _measured(measurements)]
    return join(blocks) + "\n"


def _legend(costs: Sequence[Costs]) -> str:
    periods = sorted({(one.factor_period, one.inverse_period) for one in costs})
    written = ", ".join(f"every {factor} and {inverse} mini-batches" for factor, inverse in periods)
    return bullets(
        [
            "Bytes are what one process hands to the collectives of torch.distributed, in MiB. Statistics (rows and"
            f" dense triangles) and inverses are due {written}; `per step` is their average over a refresh period.",
            "`DDP` is what DistributedDataParallel hands over at every mini-batch: all gradients. `received` is the"
            " average per mini-batch if collectives go around a ring: N − 1 messages of a gather, 2 (N − 1)/N of a"
            " sum.",
            "Not in these numbers: what batch normalisation exchanges at every mini-batch (its statistics with"
            " `sync_batch_norm=true`, its buffers otherwise), the same under all settings.",
            "`kept` are inverses (and running averages, if any) between mini-batches, the same on every process;"
            " `buffer` is what the largest exchange holds at once.",
            "Blocks are shared out or inverted by every process; GFLOP is a refresh's inversion of the process that"
            " has most of it, and of one that inverts everything.",
        ]
    )


def _counted(costs: Sequence[Costs]) -> str:
    columns = [("N", "right"), ("batch", "right"), ("setting", "left"), ("rows", "right"), ("triangles", "right")]
    columns += [("inverses", "right"), ("per step", "right"), ("DDP", "right"), ("received", "right")]
    columns += [("DDP received", "right"), ("kept", "right"), ("buffer", "right"), ("low-rank factors", "right")]
    columns += [("blocks shared", "right"), ("GFLOP (alone)", "right")]
    lines = []
    for one in sorted(costs, key=lambda one: (one.batch_size, one.num_processes)):
        sizes = [one.rows_bytes, one.moments_bytes, one.inverse_bytes, one.bytes_per_step, one.gradient_bytes]
        sizes += [one.received_per_step, one.gradients_received, one.kept_bytes, one.buffer_bytes]
        lines.append(
            [
                *(str(one.num_processes), f"{one.batch_size:,}", f"`{one.setting}`"),
                *(_mib(size) for size in sizes),
                f"{one.num_low_rank} of {one.num_factors}",
                f"{one.num_shared} of {one.num_shared + one.num_everywhere}",
                f"{number(one.inversion_flops / 1e9, 3, 3)} ({number(one.inversion_flops_alone / 1e9, 3, 3)})",
            ]
        )
    return table(columns, lines)


def _measured_legend(costs: Sequence[Costs], measurements: Sequence[Measurement], machine: Environment) -> str:
    wrong = disagreements(costs, measurements)
    agreement = "All bytes measured are the bytes counted." if not wrong else " ".join(wrong)
    sizes = sorted({one.num_processes for one in measurements})
    return (
        f"{agreement} {listed([str(size) for size in sizes])} processes that talk through gloo on one machine"
        f" ({machine.device_name}, PyTorch {machine.versions['torch']}, one thread each)."
        " Seconds are CPU seconds of the process that needs most, threads of gloo included, medians over the"
        " mini-batches measured; waiting for others is not in them. `peak` is the most that the tensors allocated by"
        " a mini-batch with a refresh hold at once."
    )


def _measured(measurements: Sequence[Measurement]) -> str:
    columns = [("N", "right"), ("setting", "left"), ("kept MiB", "right"), ("peak MiB", "right")]
    columns += [("forward, backward s", "right"), ("statistics s", "right"), ("inversion s", "right")]
    columns += [("application s", "right"), ("mini-batch without refresh s", "right")]
    lines = []
    for one in sorted(measurements, key=lambda one: one.num_processes):
        split = one.refresh_s
        seconds = [split["forward_backward"], split["statistics"], split["inversion"], one.plain_s["application"]]
        seconds.append(sum(one.plain_s.values()))
        lines.append(
            [
                *(str(one.num_processes), f"`{one.setting}`", _mib(one.kept_bytes), _mib(one.peak_bytes)),
                *(number(value, 3, 4) for value in seconds),
            ]
        )
    return table(columns, lines)


def _flat(one: Measurement) -> dict[str, object]:
    row: dict[str, object] = {name: getattr(one, name) for name in _KEYS}
    row |= {f"measured_{name}": getattr(one, name) for name in (*AGREEING, "peak_bytes")}
    for kind in ("refresh", "plain"):
        row |= {f"measured_{kind}_{phase}_s": value for phase, value in getattr(one, f"{kind}_s").items()}
    return row


def _mib(num_bytes: float) -> str:
    return number(num_bytes / _MIB, 3, 3) if num_bytes else NOTHING
