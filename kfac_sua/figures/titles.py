"""Titles from the records of runs: the network, the data set, and what distinguishes panels."""

from typing import Any

import pandas as pd

from kfac_sua.markdown import listed
from kfac_sua.methods import METHODS
from kfac_sua.runs.summary import says_group_size

# Names of the configuration as the literature writes them; any other is written as it is.
_WRITTEN = {
    **{"vgg11": "VGG11", "preact_resnet50": "PreAct-ResNet50"},
    **{"cifar10": "CIFAR-10", "cifar100": "CIFAR-100"},
    **{"constant": "constant learning rate", "step": "decay", "cosine": "cosine decay"},
}


def subject(rows: pd.DataFrame) -> str:
    """Return what was trained on what, such as ``VGG11 (width 0.25) on CIFAR-10``.

    Args:
        rows: Rows of ``collect_runs``; older tables lack ``width`` and ``schedule``, which are then left out.
    """
    return f"{_networks(rows)} on {_written(rows, 'dataset')}"


def panel_subjects(frame: pd.DataFrame) -> dict[str, str]:
    """Return a title per panel, from the records of its runs.

    Args:
        frame: Rows of ``collect_runs`` with ``panel``.

    Returns:
        Titles by name, in order. A single panel has its subject. Several have their data set, with network and schedule
        where these differ between panels, and also the panels' names if two titles would be the same.
    """
    panels = {str(name): rows for name, rows in frame.groupby("panel", sort=False)}
    if len(panels) == 1:
        return {name: subject(rows) for name, rows in panels.items()}
    have_networks = len({_networks(rows) for rows in panels.values()}) > 1
    have_schedules = len({_written(rows, "schedule") for rows in panels.values()}) > 1
    titles = {}
    for name, rows in panels.items():
        what = subject(rows) if have_networks else _written(rows, "dataset")
        titles[name] = f"{what}, {_written(rows, 'schedule')}" if have_schedules else what
    is_unique = len(set(titles.values())) == len(titles)
    return titles if is_unique else {name: f"{name}: {title}" for name, title in titles.items()}


def group_labels(rows: pd.DataFrame, candidates: pd.DataFrame) -> dict[str, str]:
    """Return labels such as ``K-FAC, groups of 16`` for the methods whose channels per group have to be told.

    Args:
        rows: Rows of ``collect_runs`` that are drawn.
        candidates: Those that they were chosen from.

    Returns:
        Labels by preconditioner; none where all groups are of one size, and the network is as wide as published.
    """
    if not says_group_size(candidates):
        return {}
    sizes = rows[rows["group_size"].notna()].groupby("preconditioner")["group_size"].unique()
    return {
        str(name): f"{METHODS[str(name)].label} of {listed([f'{size:g}' for size in sorted(found)])}"
        for name, found in sizes.items()
    }


def _networks(rows: pd.DataFrame) -> str:
    """Return the networks, each with its width unless that is the published one."""
    columns = ["model", *(["width"] if "width" in rows else [])]
    kinds = rows[columns].drop_duplicates().to_dict("records")
    return listed([_name(kind["model"]) + _width(kind.get("width", 1.0)) for kind in kinds])


def _width(width: float) -> str:
    return "" if width == 1 else f" (width {width:g})"


def _written(rows: pd.DataFrame, column: str) -> str:
    return listed([_name(value) for value in rows[column].unique()]) if column in rows else ""


def _name(value: Any) -> str:
    return _WRITTEN.get(str(value), str(value))
