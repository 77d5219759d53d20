"""The study as Markdown: overheads, where the seconds go, and where each part stops scaling."""

from dataclasses import asdict

import pandas as pd

from kfac_sua.bench.communication.cluster import Cluster
from kfac_sua.bench.communication.study import METHODS, MOST_OVERHEAD, PARTS
from kfac_sua.figures.style import METHODS as STYLES
from kfac_sua.markdown import bullets, code_block, count, join, listed, number, percent, table
from kfac_sua.preconditioner.distributed.assignment import FLOPS_PER_BYTE

_SHOWN = (1, 8, 128, 1024)
_PART_LABELS = {
    "statistics": "statistics",
    "statistics_exchange": "their exchange",
    "inversion": "inversion",
    "inversion_exchange": "its exchange",
    "application": "application",
}


def describe_study(frame: pd.DataFrame, cluster: Cluster, command: str) -> str:
    """Return the study as Markdown.

    Args:
        frame: Result of ``study.study_frame``.
        cluster: What it was computed with.
        command: The command line that gave it.
    """
    blocks = ["# Preconditioners on many GPUs, on paper", code_block([command]), _introduction(cluster)]
    blocks.append("![Overhead over SGD against the number of GPUs](study.png)")
    for (model, scaling), rows in frame.groupby(["model", "scaling"], sort=False):
        blocks += [f"## {model}, {_scaling(rows, str(scaling))}", "Overhead over SGD:", _overheads(rows)]
        blocks.append(bullets([_sentence(rows[rows["method"] == name], name) for name in METHODS]))
        blocks += ["Microseconds per mini-batch, averaged over a refresh period:", _split(rows)]
    return join(blocks) + "\n"


def _introduction(cluster: Cluster) -> str:
    stated = ", ".join(f"{name} {value:g}" for name, value in asdict(cluster).items())
    return bullets(
        [
            "This is arithmetic, not a measurement: FLOPs and bytes counted from the code that runs, divided by the"
            f" rates and bandwidths stated here: {stated} (FLOPs, bytes and seconds).",
            "A gather goes around a ring, (N − 1) · (latency + bytes of one process / bandwidth); a sum takes the"
            " faster of a ring and a tree. Within a node the links are NVLink's, beyond it the network's.",
            "SGD's mini-batch is forward + max(backward, sum of all gradients). Nothing of the preconditioner hides"
            " behind anything else. Kernel launches, small batches that do not fill a GPU, and stragglers are left"
            " out: they would slow small layers and many small blocks more than this says, and SGD too.",
            f"Inverses are shared out by the default balance of {FLOPS_PER_BYTE['cuda']:g} FLOPs per byte."
            " Preconditioners have the paper's periods and group sizes (VGG11: 50 and 32, ResNet50: 64 and 64), and"
            " where the inverse is applied follows `application=auto`.",
        ]
    )


def _scaling(rows: pd.DataFrame, scaling: str) -> str:
    first = rows.iloc[0]
    batch = int(first["batch_per_process"])
    if scaling == "weak":
        return f"weak scaling: {batch} examples per GPU"
    return f"strong scaling: {batch * int(first['num_processes']):,} examples on all GPUs together"


def _overheads(rows: pd.DataFrame) -> str:
    sizes = sorted(set(rows["num_processes"]))
    columns = [("GPUs", "right"), ("SGD ms", "right"), *((STYLES[name].label, "right") for name in METHODS)]
    lines = []
    for size in sizes:
        own = rows[rows["num_processes"] == size]
        overheads = dict(zip(own["method"], own["overhead"], strict=True))
        cells = [percent(overheads[name]) for name in METHODS]
        cells = [
            f"**{cell}**" if overheads[name] < MOST_OVERHEAD else cell
            for name, cell in zip(METHODS, cells, strict=True)
        ]
        lines.append([str(size), number(1e3 * float(own["sgd_s"].iloc[0]), 3), *cells])
    return table(columns, lines)


def _marked(overhead: float) -> str:
    """Return an overhead, in bold if it is small."""
    return f"**{percent(overhead)}**" if overhead < MOST_OVERHEAD else percent(overhead)


def _sentence(rows: pd.DataFrame, name: str) -> str:
    """Return sentences on where inversion, statistics and application stop scaling, and where the overhead is small."""
    rows = rows.sort_values("num_processes")
    sizes = [int(size) for size in rows["num_processes"]]
    little = [size for size, overhead in zip(sizes, rows["overhead"], strict=True) if overhead < MOST_OVERHEAD]
    limit = percent(MOST_OVERHEAD)
    verdict = f"below {limit} with {_ranges(little, sizes)} GPUs" if little else f"never below {limit}"
    return f"{STYLES[name].label}: {verdict}. {_inversion(rows, sizes)} {_statistics(rows, sizes)} {_application(rows)}"


def _inversion(rows: pd.DataFrame, sizes: list[int]) -> str:
    if not (rows["num_shared"] > 0).any():
        return "Its inverses are too small to be shared out: every process makes all of them."
    seconds = list(rows["inversion_s"] + rows["inversion_exchange_s"])
    best = seconds.index(min(seconds))
    speedup = float((rows["inversion_flops_alone"] / rows["inversion_flops"]).max())
    shortest = number(1e6 * seconds[best], 3, 2)
    return (
        f"Inversion and its exchange are shortest on {count(sizes[best], 'GPU')} ({shortest} µs per mini-batch);"
        f" the process with most of it inverts at best 1/{number(speedup, 2, 1)} of all."
    )


def _statistics(rows: pd.DataFrame, sizes: list[int]) -> str:
    low_rank = [(size, kept) for size, kept in zip(sizes, rows["num_low_rank"], strict=True) if kept > 0]
    if not low_rank:
        return "All factors are dense and averaged."
    kept = ", ".join(f"{amount} on {size}" for size, amount in low_rank)
    tail = "; beyond, all are dense and averaged" if low_rank[-1][0] < sizes[-1] else ""
    return f"Of its {rows['num_factors'].iloc[0]} factors, so many are kept as rows, which are gathered: {kept}{tail}."


def _application(rows: pd.DataFrame) -> str:
    shares = list(rows["application_s"] / rows["sgd_s"])
    return (
        f"The application, which every GPU does for itself, takes {percent(shares[0])} of SGD's mini-batch on the"
        f" fewest GPUs, {percent(max(shares))} at most and {percent(shares[-1])} on the most."
    )


def _ranges(little: list[int], sizes: list[int]) -> str:
    """Return sizes as ``8 to 64 and 512``: neighbours among all sizes joined."""
    runs: list[list[int]] = []
    for size in little:
        position = sizes.index(size)
        if runs and sizes.index(runs[-1][-1]) == position - 1:
            runs[-1].append(size)
        else:
            runs.append([size])
    return listed([str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs])


def _split(rows: pd.DataFrame) -> str:
    sizes = sorted(set(rows["num_processes"]))
    shown = [size for size in _SHOWN if size in sizes] or [sizes[0], sizes[-1]]
    columns = [("GPUs", "right"), ("setting", "left"), *((label, "right") for label in _PART_LABELS.values())]
    columns += [("blocks shared", "right"), ("low-rank factors", "right")]
    lines = []
    for size in dict.fromkeys(shown):
        for name in METHODS:
            (row,) = rows[(rows["num_processes"] == size) & (rows["method"] == name)].to_dict("records")
            cells = [number(1e6 * float(row[f"{part}_s"]), 3, 2) for part in PARTS]
            blocks = f"{row['num_shared']} of {row['num_shared'] + row['num_everywhere']}"
            factors = f"{row['num_low_rank']} of {row['num_factors']}"
            lines.append([str(size), STYLES[name].label, *cells, blocks, factors])
    return table(columns, lines)
