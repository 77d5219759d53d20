"""Settings of the runs beside those that the paper states, as Markdown: which are the same and which differ."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas as pd

from kfac_sua.campaign.definition import Campaign
from kfac_sua.campaign.report.panels import curve_rows, method_label
from kfac_sua.config import scaled_group_size
from kfac_sua.data.sizes import SIZES
from kfac_sua.markdown import bullets, count, escape, join, listed, table
from kfac_sua.preconditioner.registry import structure_class
from kfac_sua.preconditioner.settings import READ_BY_ALL
from kfac_sua.runs.directory import with_channels_per_group, with_later_keys
from kfac_sua.runs.run_info import RunInfo

CITATION = "Laurent, George, Bouthillier, Ballas and Vincent (2018)"
TITLE = "An Evaluation of Fisher Approximations Beyond Kronecker Factorization"
URL = "https://openreview.net/forum?id=ryVC6tkwG"

Curve = tuple[str, str]
Config = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Setting:
    """One setting of the runs, beside the paper's.

    Attributes:
        name: Name of the setting.
        here: Returns a run's value as text, or None if the run has no such setting.
        paper: The paper's value by figure, or by figure and panel such as ``fig2/right``; its first word is compared
            with the run's. Empty if the paper states none.
        agrees: Returns whether a run has the paper's value, where that is not told by the first words.
    """

    name: str
    here: Callable[[RunInfo], str | None]
    paper: Mapping[str, str] = dataclasses.field(default_factory=dict)
    agrees: Callable[[RunInfo, str], bool] | None = None

    def stated(self, figure: str, panel: str) -> str | None:
        """Return the paper's value; None if it states none."""
        return self.paper.get(f"{figure}/{panel}", self.paper.get(figure))

    def differs(self, stated: str | None, info: RunInfo) -> bool:
        """Return whether a run's value differs from the paper's; words after the first only explain it."""
        value = self.here(info)
        if stated is None or value is None:
            return False
        return stated.split()[0] != value.split()[0] if self.agrees is None else not self.agrees(info, stated)


def difference_section(campaign: Campaign, finals: pd.DataFrame, infos: Sequence[RunInfo]) -> str:
    """Return what differs from the paper, by the configurations of the runs and by the campaign's own sentences.

    Args:
        campaign: The campaign; its figure says with which experiment of the paper it is compared.
        finals: Rows of ``collect_runs`` of the final runs, with ``panel`` and ``method``.
        infos: run.json of these runs.
    """
    curves = _curve_infos(campaign, finals, infos)
    if not curves:
        return join(
            ["No final run has left a configuration to compare.", bullets([*map(escape, campaign.differences)])]
        )
    rows, departures, open_choices = [], [], []
    for setting in SETTINGS:
        here = {curve: value for curve, info in curves.items() if (value := setting.here(info)) is not None}
        if not here:
            continue
        stated = {curve: setting.stated(campaign.figure, curve[0]) for curve in here}
        others = {curve: value for curve, value in here.items() if setting.differs(stated[curve], curves[curve])}
        row = [escape(setting.name), _grouped(campaign, stated), _grouped(campaign, here)]
        if others:
            theirs = {curve: stated[curve] for curve in others}
            departures.append(
                f"{escape(setting.name)} {_grouped(campaign, others)} instead of"
                f" {_grouped(campaign, theirs)}{_whose(campaign, others, here)}"
            )
        is_open = not any(stated.values())
        open_choices += [escape(setting.name)] if is_open else []
        rows.append([*row, "–" if is_open else "**no**" if others else "yes"])
    seeds = sorted({int(seed) for seed in finals["seed"]})
    seeds_here = f"{len(seeds)} ({', '.join(map(str, seeds))})" if seeds else "none"
    rows.append(["seeds per method", "not stated", seeds_here, "–"])
    columns = [("Setting", "left"), ("Paper", "left"), ("Here", "left"), ("As in the paper", "center")]
    return join(
        [
            _paragraph(departures, open_choices),
            bullets([escape(text) for text in campaign.differences]),
            table(columns, rows),
        ]
    )


def run_sizes(frame: pd.DataFrame, infos: Sequence[RunInfo]) -> str:
    """Return for how long and on how many images runs train, such as ``5 epochs on all 45,000 training images``.

    Args:
        frame: Rows of ``collect_runs`` of these runs.
        infos: run.json of all runs.

    Returns:
        All that occur, joined by "or"; empty if none is recorded.
    """
    fingerprints = set(frame["fingerprint"])
    sizes = {
        (int(_value(info.config, "epochs")), training_images(info) or "the")
        for info in infos
        if info.fingerprint in fingerprints and _value(info.config, "epochs") is not None
    }
    return " or ".join(f"{count(epochs, 'epoch')} on {images} training images" for epochs, images in sorted(sizes))


def limit_section(finals: pd.DataFrame, has_claims: bool) -> str:
    """Return what these numbers cannot show, given the number of seeds.

    Args:
        finals: Rows of ``collect_runs`` of the final runs, with ``panel`` and ``method``.
        has_claims: Whether verdicts are given.
    """
    finished = finals[finals["status"] == "finished"]
    seeds = finished.groupby(["panel", "method"])["seed"].nunique()
    fewest = int(seeds.min()) if len(seeds) else 0
    items = [
        _bootstrap_limits(fewest),
        "Every part of a claim is tested at 95 % by itself, without a correction for their number."
        if has_claims
        else "",
        "Each cell of a grid is a single run, so that another seed may choose another cell; the intervals do not"
        " contain that.",
        "The best validation error is the lowest of a run's epochs, on images that the choice of the cell has seen"
        " too; the test error is the unbiased one.",
        "The training loss of an epoch is the mean over its mini-batches, and stands at the epoch's end: times to a"
        " training loss are up to half an epoch late, for all methods alike, which brings their ratios closer to 1.",
        "Seconds, their ratios and the times to a target belong to the hardware named below: what a refresh of the"
        " inverses costs against a step differs between machines and grows with the width of the network.",
    ]
    return bullets([item for item in items if item])


def _bootstrap_limits(seeds: int) -> str:
    if seeds == 0:
        return "No method has a finished run: nothing here is a result."
    if seeds == 1:
        return (
            "At least one method has a single finished seed: no standard deviation, no interval, and nothing that is"
            " compared with it can be decided."
        )
    # The number of multisets of n out of n seeds, which is the number of means that a bootstrap can draw.
    means = math.comb(2 * seeds - 1, seeds)
    if seeds < 10:
        return (
            f"With {seeds} finished seeds, the fewest of all methods that have any, a bootstrap can form {means}"
            " different means. A percentile interval over so few seeds cannot leave the range that they span, and"
            " covers the truth less often than in 95 % of all cases: read a decided part as what these seeds say, not"
            " as a test."
        )
    return (
        f"The method with the fewest finished seeds has {seeds}; a percentile interval over seeds is still somewhat too"
        " narrow."
    )


def _curve_infos(campaign: Campaign, finals: pd.DataFrame, infos: Sequence[RunInfo]) -> dict[Curve, RunInfo]:
    """Return the record of one run per curve, as its seeds agree in all that is compared here."""
    by_fingerprint = {info.fingerprint: info for info in infos}
    curves = {}
    for panel in campaign.panels:
        for curve in panel.curves:
            found = set(curve_rows(finals, panel.name, curve.method)["fingerprint"]) & by_fingerprint.keys()
            if found:
                curves[panel.name, curve.method] = by_fingerprint[min(found)]
    return curves


def _paragraph(departures: Sequence[str], open_choices: Sequence[str]) -> str:
    """Return the comparison in words."""
    if departures:
        text = f"Where the paper states its setting, these runs depart from it in: {'; '.join(departures)}."
    else:
        text = "Where the paper states its setting, these runs follow it."
    if open_choices:
        text += f" What it leaves open was chosen here, as in the table: {listed(open_choices)}."
    return (
        f"{text} The paper shows curves, without numbers, seeds or spread, and gives no code or data behind them."
        " So its claims can be tested, but its curves cannot be compared with these number by number."
    )


def _grouped(campaign: Campaign, values: Mapping[Curve, str | None]) -> str:
    """Return the distinct values: the most common first, and after each of the others the curves that have it."""
    groups: dict[str, list[Curve]] = {}
    for curve, value in values.items():
        groups.setdefault("not stated" if value is None else value, []).append(curve)
    ordered = sorted(groups.items(), key=lambda item: -len(item[1]))
    if len(ordered) == 1:
        return escape(ordered[0][0])
    is_default = len(ordered[0][1]) > len(ordered[1][1])
    texts = [f"{escape(value)} ({_names(campaign, members, values)})" for value, members in ordered]
    return "; ".join([escape(ordered[0][0]), *texts[1:]] if is_default else texts)


def _whose(campaign: Campaign, some: Mapping[Curve, str], every: Mapping[Curve, str]) -> str:
    """Return the curves that differ, unless all with the setting do."""
    return "" if len(some) == len(every) else f" for {_names(campaign, list(some), every)}"


def _names(campaign: Campaign, members: Sequence[Curve], every: Mapping[Curve, Any]) -> str:
    """Name curves: by panel if they are all of its curves, by method if they are all of its, otherwise by both."""
    titles = {panel.name: escape(panel.title) for panel in campaign.panels}
    panels = dict.fromkeys(panel for panel, _ in members)
    if len(titles) > 1 and sum(panel in panels for panel, _ in every) == len(members):
        return "; ".join(titles[panel] for panel in panels)
    methods = dict.fromkeys(method for _, method in members)
    if sum(method in methods for _, method in every) == len(members):
        return "; ".join(method_label(campaign, method) for method in methods)
    return "; ".join(f"{titles[panel]}: {method_label(campaign, method)}" for panel, method in members)


def _value(config: Config, key: str) -> Any:
    """Return the value of a dotted key; None where the configuration has no such key."""
    node: Any = config
    for part in key.split("."):
        node = node.get(part) if isinstance(node, Mapping) else None
    return node


def _from(key: str) -> Callable[[RunInfo], str | None]:
    """Return a setting's ``here`` that is the value of a key; None where the run's structure does not read it."""

    def here(info: RunInfo) -> str | None:
        value = _value(with_later_keys(info.config), key)
        if value is None or not _is_read(info.config, key):
            return None
        if isinstance(value, bool):
            return "yes" if value else "no"
        return f"{value:,g}" if isinstance(value, int | float) else str(value)

    return here


def _is_read(config: Config, key: str) -> bool:
    """Return whether a run depends on a key, as far as its structure says; one that is not installed may read all."""
    group, _, name = key.rpartition(".")
    structure = _value(config, "preconditioner.structure")
    if group != "preconditioner" or structure is None:
        return True
    try:
        return name in structure_class(structure).reads | READ_BY_ALL
    except ValueError:
        return True


def training_images(info: RunInfo) -> str | None:
    """Return how many of the images that are not held out a run trains on."""
    size = SIZES.get(str(_value(info.config, "dataset.name")))
    held_out = _value(info.config, "dataset.validation_size")
    used = _value(info.config, "dataset.train_size")
    if size is None or held_out is None:
        return None if used is None else f"{used:,}"
    available = size.train - int(held_out)
    return f"all {available:,}" if used in (None, available) else f"{used:,} of {available:,}"


def _group_size(info: RunInfo) -> str | None:
    """Return the channels per group, and at a width other than 1 with how many at width 1 there are as many groups."""
    size, width = _channels_per_group(info), _value(info.config, "model.width")
    if size is None or width in (None, 1):
        return None if size is None else str(size)
    return f"{size} at width {width:g} (as many groups as of {round(size / width)} at width 1)"


def _has_as_many_groups(info: RunInfo, stated: str) -> bool:
    """Return whether a layer has as many groups as with the paper's channels per group at width 1."""
    return _channels_per_group(info) == scaled_group_size(int(stated), _value(info.config, "model.width") or 1)


def _channels_per_group(info: RunInfo) -> int | None:
    size = _value(with_channels_per_group(info.config), "preconditioner.group_size")
    return None if size is None else int(size)


def _learning_rate(info: RunInfo) -> str | None:
    name = _value(info.config, "schedule.name")
    return None if name is None else "constant" if name == "constant" else "decay"


def _decay(info: RunInfo) -> str | None:
    """Return the schedule of a learning rate that decays."""
    name, milestones = (_value(info.config, f"schedule.{key}") for key in ("name", "milestones"))
    if name in (None, "constant"):
        return None
    if not milestones:
        return str(name)
    # Older runs have milestones in epochs, later ones in fractions of all epochs.
    unit = "of the epochs" if max(milestones) < 1 else "epochs"
    return f"× {_value(info.config, 'schedule.gamma'):g} after {listed([f'{m:g}' for m in milestones])} {unit}"


SETTINGS = (
    Setting("network", _from("model.name"), {"fig1": "vgg11", "fig2": "preact_resnet50"}),
    Setting("width", _from("model.width"), {"fig1": "1", "fig2": "1"}),
    Setting("batch norm", _from("model.batch_norm"), {"fig1": "yes", "fig2": "yes"}),
    Setting("initialisation", _from("model.initialisation")),
    Setting("data set", _from("dataset.name"), {"fig1": "cifar10", "fig2": "cifar10", "fig2/right": "cifar100"}),
    Setting("training images", training_images, {"fig1": "all", "fig2": "all"}),
    Setting("images held out for selection", _from("dataset.validation_size")),
    Setting("augmentation", _from("dataset.augmentation")),
    Setting("batch size", _from("batch_size"), {"fig1": "100", "fig2": "100"}),
    Setting("epochs", _from("epochs")),
    Setting(
        "learning rate over time",
        _learning_rate,
        {"fig2/left": "constant", "fig2/middle": "decay", "fig2/right": "decay"},
    ),
    Setting("decay", _decay),
    Setting("optimizer", _from("optimizer.name"), {"fig1": "sgd", "fig2": "sgd"}),
    Setting("momentum", _from("optimizer.momentum"), {"fig1": "0.9", "fig2": "0.9"}),
    Setting("weight decay", _from("optimizer.weight_decay")),
    Setting("group size", _group_size, {"fig1": "32", "fig2": "64"}, _has_as_many_groups),
    Setting("mini-batches between inverses", _from("preconditioner.inverse_period"), {"fig1": "50", "fig2": "64"}),
    Setting("running average of the factors", _from("preconditioner.ema_decay"), {"fig2": "0"}),
    Setting("damping rule", _from("preconditioner.damping_rule")),
    Setting(
        "weight sharing",
        _from("preconditioner.weight_sharing"),
        {"fig1": "reduce (implied by eq. 1)", "fig2": "reduce (implied by eq. 1)"},
    ),
    Setting(
        "kind of Fisher",
        _from("preconditioner.fisher_type"),
        {"fig1": "mc (implied by footnote 1)", "fig2": "mc (implied by footnote 1)"},
    ),
    Setting("precision", lambda info: info.precision),
    Setting("device", lambda info: info.device_name),
)
