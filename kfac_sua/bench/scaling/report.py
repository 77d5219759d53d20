"""The study as Markdown: costs in multiples of the layer's own step, exponents, and what was not measured."""

from typing import Any

import pandas as pd

from kfac_sua.bench.scaling.cases import COSTS, GROUP_SIZE, GROUPED, IMAGE_SIZE, SWEEPS
from kfac_sua.markdown import NOTHING, bullets, count, escape, join, listed, number, table
from kfac_sua.methods import METHODS

_BASES = {sweep.name: sweep.base for sweep in SWEEPS}
_SYMBOLS = {"width": "channels m", "kernel": "kernel size k", "group": "group size s", "batch": "mini-batch N"}
_LABELS = {
    "kfac": METHODS["kfac"].label,
    "sua": METHODS["sua"].label,
    "grouped": f"{METHODS['grouped'].label} of {GROUP_SIZE}",
    "sua_grouped": f"{METHODS['sua_grouped'].label} of {GROUP_SIZE}",
}
_LEGEND = (
    "Refresh (statistics and inversion) / application. The application is due at every mini-batch, a refresh only"
    " every 50 (VGG11) or 64 (ResNet50) of them in the paper."
)
_PAPER = (
    "The paper counts the inverse only. Sec. 2.1: SUA reduces “the computational requirement of the inverse” from"
    " O((k_w k_h m)³) for K-FAC “to only O(m³) under the SUA approximation, where m is the channel size”, so 6 in k (0"
    " under SUA) and 3 in m. Sec. 2.2: with channel groups it is O(g(k²m/g)³) for K-FAC and O(g(m/g)³) under SUA; the"
    " text calls g “the group size”, but goes on with “g inverses of size m/g”, so g is the number of groups, and with"
    " s = m/g the count is 1 in m at a fixed s and 2 in s at a fixed m. The mini-batch is in none of them (0)."
)


def describe_study(frame: pd.DataFrame, exponents: pd.DataFrame) -> str:
    """Return the study as Markdown.

    Args:
        frame: Result of ``record.to_frame``, with at least one case measured.
        exponents: Result of ``exponents.exponent_table``.
    """
    widths = frame[frame["sweep"] == "width"]
    blocks = ["# Cost of refresh and application against the size of a layer", _introduction(frame)]
    if len(widths):
        blocks += ["## Multiples of the layer's forward and backward", _LEGEND]
        blocks += ["Dense inverses (`inverse_method=cholesky`), what the paper counts:", _multiples(widths, "cholesky")]
        blocks += ["The form of fewer FLOPs (`inverse_method=auto`):", _multiples(widths, "auto")]
    dense = exponents[exponents["inverse_method"] == "cholesky"]
    if len(dense):
        blocks += ["## Exponents of growth with dense inverses", _exponents(dense), _how_to_read(exponents)]
    keys = ["channels", "kernel_size", "batch_size", "method", "group_size", "inverse_method"]
    noted = frame[frame["note"] != ""].drop_duplicates(keys)
    left_out = bullets([_note(row) for _, row in noted.iterrows()])
    return join([*blocks, *(["## Not measured", left_out] if left_out else [])]) + "\n"


def _introduction(frame: pd.DataFrame) -> str:
    measured = frame[frame["note"] == ""]
    first, base = frame.iloc[0], _BASES["width"]
    is_cpu = first["device"] == "cpu"
    clock = "process CPU" if is_cpu else "device"
    threads = f", {count(int(first['num_threads']), 'thread')}" if is_cpu else ""
    commits = [_short(commit) for commit in measured["commit"].unique() if commit]
    return (
        f"One convolution C→C, k×k, padding k//2, no bias, on random inputs [N, C, {IMAGE_SIZE}, {IMAGE_SIZE}] in"
        f" float32, forward, and backward with respect to inputs and weights; k = {base.kernel_size} and"
        f" N = {base.batch_size} where they do not vary. Medians of {clock} seconds over"
        f" {count(int(measured['repeats'].min()), 'turn')} or more, in which all structures and the bare layer follow"
        f" each other. Measured on {escape(first['device_name'])}{threads}, PyTorch {escape(first['torch'])}, kfac_sua"
        f" {escape(first['kfac_sua'])}{f' at {listed(commits)}' if commits else ''}."
    )


def _short(commit: str) -> str:
    digest, _, dirty = commit.partition("+")
    return f"{digest[:7]} with uncommitted changes" if dirty else digest[:7]


def _multiples(widths: pd.DataFrame, inverse_method: str) -> str:
    """Return refresh and application per structure as multiples of the layer's forward and backward."""
    chosen = widths[widths["inverse_method"] == inverse_method]
    columns = [
        ("channels", "right"),
        ("forward, backward (s)", "right"),
        *((label, "right") for label in _LABELS.values()),
    ]
    lines = []
    for size, points in chosen.groupby("size"):
        own = points.loc[points["cost"] == "forward_backward", "seconds"].median()
        cells = [_multiple(points[points["method"] == method]) for method in _LABELS]
        lines.append([str(size), number(own, 3), *cells])
    return table(columns, lines)


def _multiple(points: pd.DataFrame) -> str:
    if points.empty:
        return NOTHING
    if points["note"].iloc[0]:
        return "not measured"
    seconds = points.set_index("cost")["seconds"]
    own = seconds["forward_backward"]
    refresh = (seconds["statistics"] + seconds["inversion"]) / own
    form = ", low rank" if points["is_low_rank"].any() else ""
    return f"{number(refresh, 2)}× / {number(seconds['application'] / own, 2)}×{form}"


def _exponents(dense: pd.DataFrame) -> str:
    """Return measured exponents, with the counted or the paper's in parentheses."""
    columns = [("in", "left"), ("structure", "left"), ("sizes fitted", "right")]
    columns += [("statistics (counted)", "right"), ("inversion (paper)", "right"), ("application (counted)", "right")]
    lines = []
    for _, rows in dense.groupby(["sweep", "method"], sort=False):
        first = rows.iloc[0]
        label = METHODS[first["method"]].label if first["sweep"] == "group" else _LABELS[first["method"]]
        cells = [_exponent(rows[rows["cost"] == cost].iloc[0]) for cost in COSTS[1:]]
        lines.append([_SYMBOLS[first["sweep"]], label, f"{first['smallest']} to {first['largest']}", *cells])
    return table(columns, lines)


def _exponent(row: "pd.Series[Any]") -> str:
    reference = row["counted_exponent"] if pd.isna(row["paper_exponent"]) else row["paper_exponent"]
    measured = number(row["exponent"], 3, 2)
    if not pd.isna(row["standard_error"]):
        measured = f"{measured} ± {number(row['standard_error'], 3, 2)}"
    return f"{measured} ({number(reference, 2, 1)})"


def _how_to_read(exponents: pd.DataFrame) -> str:
    sweeps = exponents["sweep"].unique()
    return bullets(
        [
            "Slopes of log seconds over log size by least squares, ± their standard error, over the larger half of each"
            " sweep's sizes (at least three), as small sizes measure overhead. Fixed meanwhile:"
            f" {'; '.join(f'{_SYMBOLS[name]} at {_fixed(name)}' for name in sweeps)}.",
            _PAPER,
            "Counted: FLOPs of both dense factors, fitted to the same sizes. Those of the statistics are of plain Gram"
            " matrices; K-FAC's, formed from correlations between image rows where that is possible, grow less in k.",
            "Exponents with `inverse_method=auto` are in scaling-exponents.csv, where all sizes fitted have one form.",
        ]
    )


def _fixed(name: str) -> str:
    base = _BASES[name]
    fixed = {"m": base.channels, "k": base.kernel_size, "N": base.batch_size}
    return ", ".join(f"{symbol} = {value}" for symbol, value in fixed.items() if value)


def _note(row: "pd.Series[Any]") -> str:
    label = METHODS[str(row["method"])].label
    groups = f" of {row['group_size']}" if str(row["method"]) in GROUPED else ""
    return (
        f"{label}{groups}, {row['channels']} channels, {row['kernel_size']}×{row['kernel_size']}, mini-batch"
        f" {row['batch_size']}, `{row['inverse_method']}`: {str(row['note']).removeprefix('not measured: ')}."
    )
