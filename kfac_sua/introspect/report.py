"""The study as Markdown: what was measured, tables, what they say, limits, and where the numbers come from."""

import dataclasses
from collections.abc import Mapping, Sequence

import pandas as pd

from kfac_sua.config import KroneckerConfig
from kfac_sua.introspect.measure import DIAGONAL, EXACT, PLAIN, REFERENCES, WHOLE
from kfac_sua.introspect.record import Provenance
from kfac_sua.introspect.study import INHERITED, Study, title_of
from kfac_sua.markdown import NOTHING, bullets, code, code_block, count, escape, join, listed, number, table
from kfac_sua.methods import MethodStyle
from kfac_sua.preconditioner.registry import structure_class
from kfac_sua.preconditioner.settings import KroneckerSettings

FISHERS = {"empirical": "the empirical Fisher", "mc": "the Fisher by sampled labels", "exact": "the exact Fisher"}
_ERRORS = {
    "relative_error": "relative error",
    "cosine": "cos(K, F)",
    "trace_ratio": "tr K / tr F",
    "basis_error": "by eigenbasis",
    "eigenvalue_error": "by eigenvalues",
    "direction_cosine": "cos of direction",
}


@dataclasses.dataclass(frozen=True)
class ReportInput:
    """All that a report is computed from.

    Attributes:
        study: What was measured.
        frame: Its table, checkpoints in the order of training.
        styles: Names by method and line of reference, in their order.
        damping: ε of the tables that show one.
        provenances: What measured the parts.
        command: The command line.
    """

    study: Study
    frame: pd.DataFrame
    styles: Mapping[str, MethodStyle]
    damping: float
    provenances: Sequence[Provenance]
    command: str

    @property
    def last(self) -> str:
        """The last checkpoint."""
        return str(self.frame["checkpoint"].iloc[-1])


_CAPTION = (
    "From the top: the share of the attainable decrease over the checkpoints, and over the damping; the share against"
    " Frobenius' error; and the two parts of its square. Bands and markers show every seed."
)


def page_title(study: Study) -> str:
    """Return the heading of the report, as plain text."""
    return f"How close each approximation is to the Fisher: {title_of(study)}"


def describe(report: ReportInput) -> str:
    """Return the report as Markdown; the same input gives the same text."""
    fishers = list(dict.fromkeys(report.frame["fisher"]))
    blocks = [f"# {escape(page_title(report.study))}", _introduction(report)]
    blocks += ["![Shares and errors](introspect.png)", f"*{_CAPTION}*", "## What it says", _findings(report, fishers)]
    for fisher in fishers:
        blocks += [f"## Against {FISHERS[fisher]}", _legend(report), _checkpoint_tables(report, fisher)]
    blocks += [f"## Share over the damping ({report.last}, all layers at once)", _damping_table(report, fishers)]
    blocks += [f"## Share of each layer ({report.last}, ε = {report.damping:g})", _layer_tables(report, fishers)]
    blocks += ["## Limits", _limits(report), "## Where the numbers come from", _provenance(report)]
    return join(blocks) + "\n"


def _introduction(report: ReportInput) -> str:
    study, frame = report.study, report.frame
    steps = frame.drop_duplicates("checkpoint")[["checkpoint", "step"]]
    states = listed([f"{checkpoint} (step {step})" for checkpoint, step in steps.itertuples(index=False)])
    images = listed([f"{study.images[fisher]} for {FISHERS[fisher.value]}" for fisher in study.fishers])
    layers = frame.loc[frame["scope"] == "layer", "layer"].nunique()
    parameters = int(frame.loc[frame["scope"] == "network", "parameters"].iloc[0])
    return (
        f"{escape(title_of(study))}, {escape(study.source.description)}; {count(len(study.seeds), 'seed')}. Looked at:"
        f" {states}, {count(layers, 'layer')} with {parameters:,} parameters. Images: {images}, and as many others for"
        " “statistics of other images”. F is the Fisher of the images itself, per layer (“block by block”) or over"
        " all layers (“at once”); it is never formed. v is the gradient of their mean loss. A direction u, such as"
        " (K + εI)⁻¹v, is judged by the damped quadratic model −v·u + ½ uᵀ(F + εI)u: its **share** is the decrease by"
        " the best step along u, divided by the largest decrease ½ vᵀ(F + εI)⁻¹v. Numbers are means over seeds, ±"
        " their standard deviation."
    )


def _legend(report: ReportInput) -> str:
    return (
        f"Errors are of all layers' blocks, against the exact blocks; shares at ε = {report.damping:g}, with statistics"
        " of the same images / of other images."
    )


def _chosen(report: ReportInput, **where: object) -> pd.DataFrame:
    """Return the rows with these values."""
    frame = report.frame
    for column, value in where.items():
        frame = frame[frame[column] == value]
    return frame


def _checkpoint_tables(report: ReportInput, fisher: str) -> str:
    columns = [("", "left"), *((text, "right") for text in _ERRORS.values())]
    columns += [("share, block by block", "right"), ("share, at once", "right")]
    blocks = []
    for checkpoint in dict.fromkeys(report.frame["checkpoint"]):
        rows = _chosen(report, fisher=fisher, checkpoint=checkpoint, damping=report.damping)
        loss = rows.groupby("seed")["loss"].first()
        lines = []
        for method, style in report.styles.items():
            own = rows[rows["method"] == method]
            if own.empty:
                continue
            same = own[(own["statistics"] == "same") & (own["scope"] == ("network" if method == WHOLE else "blocks"))]
            errors = [_mean(same[column]) for column in _ERRORS]
            shares = [_pair(own[own["scope"] == scope], "share") for scope in ("blocks", "network")]
            lines.append([escape(style.label), *errors, *shares])
        blocks += [f"**{checkpoint}**, loss {_mean(loss)}:", table(columns, lines)]
    return join(blocks)


def _pair(rows: pd.DataFrame, column: str) -> str:
    """Return the means with statistics of the same and of other images."""
    if rows.empty:
        return NOTHING
    return " / ".join(_mean(rows.loc[rows["statistics"] == name, column]) for name in ("same", "other"))


def _mean(values: "pd.Series[float]") -> str:
    """Return mean ± standard deviation over seeds, with three decimals."""
    if values.empty or values.isna().any():
        return NOTHING
    mean = f"{values.mean():.3f}"
    return mean if len(values) == 1 else f"{mean} ± {values.std():.3f}"


def _damping_table(report: ReportInput, fishers: Sequence[str]) -> str:
    dampings = sorted(set(report.frame["damping"]))
    columns = [("", "left"), *((f"{fisher}, ε = {damping:g}", "right") for fisher in fishers for damping in dampings)]
    lines = []
    for method, style in report.styles.items():
        rows = _chosen(report, method=method, scope="network", checkpoint=report.last, statistics="same")
        if len(rows) and method != WHOLE:
            cells = [
                _mean(rows.loc[(rows["fisher"] == fisher) & (rows["damping"] == damping), "share"])
                for fisher in fishers
                for damping in dampings
            ]
            lines.append([escape(style.label), *cells])
    return table(columns, lines)


def _layer_tables(report: ReportInput, fishers: Sequence[str]) -> str:
    """Return the mean share of each layer and method, statistics of the same images."""
    names = [name for name in report.styles if name not in (EXACT, WHOLE) and name in set(report.frame["method"])]
    columns = [
        ("layer", "left"),
        ("parameters", "right"),
        *((escape(report.styles[name].label), "right") for name in names),
    ]
    blocks = []
    for fisher in fishers:
        rows = _chosen(
            report, fisher=fisher, scope="layer", checkpoint=report.last, statistics="same", damping=report.damping
        )
        means = {name: rows[rows["method"] == name].groupby("layer")["share"].mean().to_dict() for name in names}
        sizes = rows.groupby("layer", sort=False)["parameters"].first()
        lines = [
            [escape(str(layer)), f"{size:,}", *(_rounded(means[name][layer], 3) for name in names)]
            for layer, size in sizes.items()
        ]
        blocks += [f"Against {FISHERS[fisher]}:", table(columns, lines)]
    return join(blocks)


def _findings(report: ReportInput, fishers: Sequence[str]) -> str:
    """Return what the numbers say, in sentences that follow from them alone."""
    return bullets([sentence for fisher in fishers for sentence in _findings_of(report, fisher)])


def _findings_of(report: ReportInput, fisher: str) -> list[str]:
    at = {"fisher": fisher, "checkpoint": report.last, "damping": report.damping}
    network = _chosen(report, **at, scope="network")
    blocks = _chosen(report, **at, scope="blocks")
    shares, others = (
        network[network["statistics"] == name].groupby("method")["share"].mean() for name in ("same", "other")
    )
    same = blocks[blocks["statistics"] == "same"]
    errors = same.groupby("method")[["relative_error", "basis_error"]].mean()
    names = [name for name in report.styles if name in shares.index and name not in REFERENCES]
    ordered = sorted(names, key=lambda name: -shares.fillna(-1)[name])
    near = [name for name in names if not pd.isna(errors["relative_error"][name])]
    by_error = sorted(near, key=lambda name: errors["relative_error"][name])
    where = f"{FISHERS[fisher]}, {report.last}, ε = {report.damping:g}"
    order = [f"{escape(report.styles[name].label)} {_rounded(shares[name])}" for name in [*ordered, DIAGONAL, PLAIN]]
    sentences = [
        f"Share of the attainable decrease, all layers at once ({where}): {', '.join(order)}; the exact blocks, layer"
        f" by layer, {_rounded(shares[EXACT])}."
    ]
    if len(near) > 1:
        first, last = by_error[0], by_error[-1]
        ranks = (
            f"Frobenius' error ({where}) ranks {escape(report.styles[first].label)} first"
            f" ({errors['relative_error'][first]:.2f}) and {escape(report.styles[last].label)} last"
            f" ({errors['relative_error'][last]:.2f})"
        )
        rank = _rank_correlation([shares[name] for name in near], [-errors["relative_error"][name] for name in near])
        if rank is not None:
            agree = "agrees with" if rank > 0.8 else "disagrees with" if rank < 0.3 else "agrees in part with"
            ranks += f"; its order {agree} that of the shares (rank correlation {number(rank, 2, 2)})"
        sentences.append(f"{ranks}.")
    with_error = [name for name in near if errors["relative_error"][name] > 0]
    parts = {name: errors["basis_error"][name] ** 2 / errors["relative_error"][name] ** 2 for name in with_error}
    known = {name: part for name, part in parts.items() if not pd.isna(part)}
    if known:
        low, high = min(known, key=lambda name: known[name]), max(known, key=lambda name: known[name])
        sentences.append(
            f"The eigenbasis causes {100 * known[low]:.0f} % of the squared error of"
            f" {escape(report.styles[low].label)} and {100 * known[high]:.0f} % of that of"
            f" {escape(report.styles[high].label)} ({where}); the eigenvalues cause the rest."
        )
    if not others[names].isna().any():
        best = max(names, key=lambda name: others[name])
        sentences.append(
            f"With statistics of other images ({where}) the share of the exact blocks falls from"
            f" {_rounded(shares[EXACT])} to {_rounded(others[EXACT])}, and that of the exact Fisher over all layers"
            f" from 1 to {_rounded(others[WHOLE])}; of the structures {escape(report.styles[best].label)} has most"
            f" there, {_rounded(others[best])} (with the same images {_rounded(shares[best])})."
        )
    return sentences


def _rank_correlation(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Return Spearman's rank correlation; ``None`` where numbers are unknown, or all of one side are equal."""
    ranks = pd.DataFrame({"first": first, "second": second}).rank()
    if ranks.isna().any(axis=None) or (ranks.nunique() == 1).any():
        return None
    return float(ranks["first"].corr(ranks["second"]))


def _rounded(value: float, decimals: int = 2) -> str:
    """Return a mean, or a dash where it is undefined."""
    return NOTHING if pd.isna(value) else f"{value:.{decimals}f}"


def _limits(report: ReportInput) -> str:
    study = report.study
    images = max(study.images.values())
    return bullets(
        [
            "The network is in evaluation mode, with the statistics of batch normalisation held at those of the images:"
            " in training mode an example's loss depends on the others, so that it has no gradient of its own.",
            "Layers that the preconditioner leaves to the plain gradient, such as normalisation, are not among “all"
            " layers”.",
            f"F is that of {images} images or fewer, so its rank is at most their number (times the classes, for the"
            " exact Fisher), and v lies in the span of their gradients. The line “exact block” with statistics of other"
            " images shows what is left of exactness beyond the images.",
            "The share is a statement about the damped quadratic model of one mini-batch at one moment, not about"
            " training: learning rate, momentum and inverses that grow old are no part of it.",
            "Where eigenvalues of K are equal, as over the taps of SUA, its eigenbasis is that in which the Kronecker"
            " product is written; the plain gradient's, all of whose are equal, is that of the weights.",
        ]
    )


def _provenance(report: ReportInput) -> str:
    commits = dict.fromkeys(code(one.commit) if one.commit else "a copy without a commit" for one in report.provenances)
    versions = dict.fromkeys(escape(one.torch) for one in report.provenances)
    devices = dict.fromkeys(escape(one.device_name) for one in report.provenances)
    rules: dict[str, list[str]] = {}
    for name, settings in report.study.methods.items():
        is_read = "damping_rule" in structure_class(settings.structure).reads
        rule = f"damping_rule={settings.damping_rule}" if is_read else "ε on the block itself"
        rules.setdefault(rule, []).append(escape(report.styles[name].label))
    damping = "; ".join(f"{rule} for {listed(names)}" for rule, names in rules.items())
    items = [
        f"Measured by {listed([*commits])} with PyTorch {listed([*versions])} on {listed([*devices])}, in float64.",
        f"Damping: {damping}.",
        "Every number is in introspect.csv.",
    ]
    own = report.study.source.config.preconditioner
    if isinstance(own, KroneckerConfig):
        values = {key: getattr(own, key) for key in INHERITED}
        set_by_run = [f"{key}={value}" for key, value in values.items() if value != getattr(KroneckerSettings(), key)]
        if set_by_run:
            items.insert(2, f"As in the run, for methods that do not say otherwise: {escape(listed(set_by_run))}.")
    return join([bullets(items), code_block([report.command])])
