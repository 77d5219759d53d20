"""Where the numbers come from, as Markdown: hardware, versions, commits, and the commands that reproduce them."""

from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import pandas as pd

from kfac_sua.campaign.definition import Campaign, Scale
from kfac_sua.markdown import bullets, code, code_block, count, escape, join, listed, number
from kfac_sua.runs.comparable import CIRCUMSTANCES
from kfac_sua.runs.run_info import UNENDED, RunInfo

_NOT_RECORDED = "not recorded"


def environment_section(
    grid: pd.DataFrame, finals: pd.DataFrame, infos: Sequence[RunInfo], source_commit: str | None = None
) -> str:
    """Return hardware, versions, commits and cost; where runs differ, all of their values.

    Args:
        grid: Rows of ``collect_runs`` of all grid cells.
        finals: Those of the final runs.
        infos: run.json of all runs.
        source_commit: Commit of the source that makes the report.
    """
    if not infos:
        return "No run has left a record of where it ran."
    hardware = Counter(
        f"{escape(info.device_name)} ({escape(info.device)}), {count(info.num_threads, 'CPU thread')}" for info in infos
    )
    packages = list(dict.fromkeys(name for info in infos for name in info.versions))
    versions = [f"{escape(name)} {_versions(infos, name)}" for name in packages]
    starts, ends = [info.started for info in infos], [info.ended for info in infos if info.ended]
    period = f"{_minute(min(starts, key=datetime.fromisoformat))} to " + (
        _minute(max(ends, key=datetime.fromisoformat)) if ends else "no end recorded"
    )
    machines = Counter(escape(" and then ".join(info.machines)) or _NOT_RECORDED for info in infos)
    items = [
        f"Hardware: {_with_counts(hardware)}",
        *([f"Machines: {_with_counts(machines)}"] if len(machines) > 1 else []),
        f"Precision of convolutions and products: {_with_counts(Counter(escape(info.precision) for info in infos))}",
        f"Versions: {', '.join(versions)}",
        f"Commit of the runs: {_with_counts(Counter(_commit(info.commit) for info in infos))}",
        f"Commit of figures, statistics and verdicts: {_commit(source_commit)}",
        f"Runs: {_cost('grid', grid)}; {_cost('final', finals)}",
        f"Time: {period}",
    ]
    return bullets(items)


def command_section(
    campaign: Campaign, scale: Scale, overrides: Sequence[str], command: str, cells: Mapping[tuple[str, str], str]
) -> str:
    """Return the command of the whole campaign, what its scale adds, and the command of each curve's final run.

    Args:
        campaign: Panels and methods, in their order.
        scale: What the scale adds to the curves' own overrides.
        overrides: What the user added to those of every run.
        command: Command of the campaign.
        cells: Per panel and method, the command of one final run.
    """
    lines = []
    for panel in campaign.panels:
        for curve in panel.curves:
            if (panel.name, curve.method) in cells:
                lines += [f"# {panel.name}, {curve.method}", cells[panel.name, curve.method]]
    return join(
        [
            "Everything in this report, also after an interruption:",
            code_block([command]),
            "What is added to the overrides of each curve:",
            bullets(_scale_items(campaign, scale, overrides)),
            "One final run of each curve; other seeds differ in `seed` alone:" if lines else "",
            code_block(lines) if lines else "",
        ]
    )


def dirty_warning(infos: Sequence[RunInfo]) -> str:
    """Return a caution if runs were made with uncommitted changes or by several commits; otherwise empty."""
    commits = {info.commit for info in infos}
    dirty = sum(bool(info.commit) and str(info.commit).endswith("+dirty") for info in infos)
    warnings = [f"{count(dirty, 'run was', 'runs were')} made with uncommitted changes"] if dirty else []
    if len(commits) > 1:
        warnings.append(f"the runs are of {len(commits)} different states of the source")
    return f"**Caution: {listed(warnings)}**, see below." if warnings else ""


def timing_warning(infos: Sequence[RunInfo]) -> str:
    """Return a caution if the final runs differ in machine, threads, versions or ways of computing; otherwise empty.

    Their precisions are no part of it, as ``require_one_precision`` refuses reports of several.

    Args:
        infos: run.json of the final runs, as the machine that makes the report may be another.
    """
    kinds: dict[str, set[Any]] = {
        **{each.plural: {value for info in infos for value in each.values(info)} for each in CIRCUMSTANCES.values()},
        "sets of versions": {tuple(sorted(info.versions.items(), key=str)) for info in infos},
        "settings of capture": {info.config.get("capture") is False for info in infos if info.device == "cuda"},
        "settings of deterministic": {
            bool(info.config.get("deterministic")) for info in infos if info.device == "cuda"
        },
    }
    mixed = [f"{len(values)} {what}" for what, values in kinds.items() if len(values) > 1]
    if not mixed:
        return ""
    is_of_one_kind = len(mixed) == 1 and mixed[0].endswith("machines")
    unless = ", unless these are alike and were equally busy" if is_of_one_kind else ""
    return f"**Caution: the final runs are of {listed(mixed)}; their seconds cannot be compared{unless}**, see below."


def _scale_items(campaign: Campaign, scale: Scale, by_user: Sequence[str]) -> list[str]:
    """Return what a scale consists of: overrides, and the grids it gives to methods."""
    methods: dict[str, dict[str, None]] = {}
    for panel in campaign.panels:
        for curve in panel.curves:
            sweep = scale.sweeps.get(curve.tuning, curve.tuning)
            methods.setdefault(sweep, {})[curve.method] = None
    overrides: dict[str, Sequence[str]] = {"every run": scale.run, "runs of the grid, after these": scale.grid}
    overrides |= {"every run, instead of what stands above": by_user} if by_user else {}
    return [
        *(f"{what}: {' '.join(map(code, values)) or 'nothing'}" for what, values in overrides.items()),
        *(f"grid of {listed([*map(code, names)])}: {code(f'sweep={sweep}')}" for sweep, names in methods.items()),
        f"growth of a grid beyond an edge: at most {count(scale.growth_steps, 'step')}",
    ]


def _with_counts(texts: "Counter[str]") -> str:
    """Return texts, with the number of runs of each where they differ."""
    if len(texts) == 1:
        return next(iter(texts))
    return "; ".join(f"{text}: {count(runs, 'run')}" for text, runs in texts.most_common())


def _versions(infos: Sequence[RunInfo], package: str) -> str:
    found = dict.fromkeys(info.versions.get(package) or "not installed" for info in infos)
    return escape(" and ".join(found))


def _commit(commit: str | None) -> str:
    if commit is None:
        return f"{_NOT_RECORDED} (not a git checkout)"
    is_dirty = commit.endswith("+dirty")
    return code(commit) + (" (**uncommitted changes**)" if is_dirty else "")


def _minute(time: str) -> str:
    """Return an ISO 8601 time to the minute, in its own zone."""
    return escape(datetime.fromisoformat(time).strftime("%Y-%m-%d %H:%M %Z").strip())


def _cost(stage: str, frame: pd.DataFrame) -> str:
    """Return how many runs a stage has, how they ended, and the sum of their training time.

    A run that curves share counts once.
    """
    runs = frame.groupby("run", sort=False).agg({"status": "last", "train_time_s": "max"})
    others = [f"{int((runs['status'] == name).sum())} {name}" for name in ("diverged", *UNENDED)]
    others = [text for text in others if not text.startswith("0 ")]
    hours = float(runs["train_time_s"].sum()) / 3600
    ended = f" ({', '.join(others)})" if others else ""
    return f"{count(len(runs), f'{stage} run')}{ended} with {number(hours, 3)} hours of training"
