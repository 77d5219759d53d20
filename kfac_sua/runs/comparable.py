"""Whether the seconds of runs can be compared: what decides over them beside the method, and where it differs.

Precision is apart: figures and reports refuse runs of several (``require_one_precision``), tables divide them.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd

from kfac_sua.runs.run_info import ENDED, RunInfo
from kfac_sua.runs.summary import APART

_JOIN = "; "  # between the values of one run, or of the runs of one row; no name of a device or machine has it
_MAX_NAMED = 3  # values of one method that a sentence names; more are counted, as the nodes of a cluster


@dataclasses.dataclass(frozen=True)
class Circumstance:
    """What decides over a run's seconds, and is no part of its method.

    Attributes:
        values: All that a run was made with: several if it was resumed elsewhere, none if that was not recorded.
        plural: What several of them are.
        preposition: What stands before them.
        unit: Of numbers, what one and what several of them count.
        verdict: What follows "Seconds" where runs differ.
    """

    values: Callable[[RunInfo], Sequence[Any]]
    plural: str
    preposition: str
    unit: tuple[str, str] | None = None
    verdict: str = "are not comparable"

    def said(self, values: Sequence[str], *, is_first: bool) -> str:
        """Return with or on what a method ran; what numbers count is said once in a sentence.

        Args:
            values: The different ones, at least one.
            is_first: Whether nothing stands before it in the sentence.
        """
        if self.unit is None:
            what = _listed(values) if len(values) <= _MAX_NAMED else f"{len(values)} {self.plural}"
        else:
            what = _listed(values) + (f" {self.unit[list(values) != ['1']]}" if is_first else "")
        return f"{self.preposition} {what}"


# Column of a table of runs -> what it holds.
CIRCUMSTANCES = {
    "device_name": Circumstance(lambda info: [info.device_name], "devices", "on"),
    "machines": Circumstance(
        lambda info: info.machines,
        *("machines", "on", None),
        "are not comparable unless these machines are alike and were equally busy",
    ),
    "process_counts": Circumstance(
        lambda info: info.process_counts, "numbers of processes", "as", ("process", "processes")
    ),
    "num_threads": Circumstance(
        lambda info: [info.num_threads], "numbers of CPU threads", "with", ("CPU thread", "CPU threads")
    ),
}


def circumstances(info: RunInfo) -> dict[str, str]:
    """Return the columns that a run has in a table.

    Args:
        info: Its run.json.

    Returns:
        Text by the names in ``CIRCUMSTANCES``; empty where it was not recorded.
    """
    return {name: _JOIN.join(map(str, each.values(info))) for name, each in CIRCUMSTANCES.items()}


def circumstances_of(rows: pd.DataFrame) -> dict[str, str]:
    """Return the columns that one row has which stands for several runs.

    Args:
        rows: Rows of ``collect_runs``; tables of before lack these columns.
    """
    return {name: _JOIN.join(_values(rows[name])) if name in rows else "" for name in CIRCUMSTANCES}


def seconds_cautions(frame: pd.DataFrame) -> list[str]:
    """Return why the seconds of the methods in a table cannot be compared, a sentence each.

    Compared are the methods of one panel, or of one network, data set and precision where there are no panels.

    Args:
        frame: Rows of ``collect_runs``, or any table with the columns in ``CIRCUMSTANCES``. What a table of before
            lacks, or a run of before did not record, is no difference.

    Returns:
        Nothing where all is alike, and of one method alone.
    """
    if "status" in frame:  # of all others no seconds are shown
        frame = frame[frame["status"].isin(ENDED)]
    keys = ["panel"] if "panel" in frame else [name for name in APART if name in frame]
    groups_by_difference: dict[tuple[str, str], list[str]] = {}
    groups = {", ".join(map(_text, key)): rows for key, rows in frame.groupby(keys, sort=False, dropna=False)}
    for group, rows in groups.items():
        for difference in _differences(rows):
            groups_by_difference.setdefault(difference, []).append(group)
    return [
        f"Seconds{'' if len(found) == len(groups) else f' of {_listed(found)}'} {verdict}: {who}."
        for (verdict, who), found in groups_by_difference.items()
    ]


def _differences(rows: pd.DataFrame) -> list[tuple[str, str]]:
    """Return, for all in which the methods of one group differ, the verdict and who ran with what."""
    methods = _methods(rows)
    if methods.nunique() < 2:
        return []
    found = [name for name in CIRCUMSTANCES if name in rows and len(_values(rows[name])) > 1]
    if "device_name" in found and "machines" in found:
        found.remove("machines")  # the name of a machine has its device in it
    return [(CIRCUMSTANCES[name].verdict, _who(CIRCUMSTANCES[name], rows[name], methods)) for name in found]


def _who(circumstance: Circumstance, column: "pd.Series[Any]", methods: "pd.Series[str]") -> str:
    """Return which methods ran with what, those with the same together: ``baseline ran with 2 CPU threads, sua …``."""
    by_values: dict[tuple[str, ...], list[str]] = {}
    for method, cells in column.groupby(methods, sort=False):
        if values := tuple(_values(cells)):
            by_values.setdefault(values, []).append(str(method))
    parts = [
        f"{_listed(names)} {'' if index else 'ran '}{circumstance.said(values, is_first=not index)}"
        for index, (values, names) in enumerate(by_values.items())
    ]
    return (", " if max(map(len, by_values.values())) == 1 else "; ").join(parts)


def _methods(rows: pd.DataFrame) -> "pd.Series[str]":
    """Return the method of each row: comparators differ from the baseline in their optimizer alone."""
    if "method" in rows:
        return rows["method"]
    optimizers = pd.Series(rows.get("optimizer", "sgd"), index=rows.index, dtype=object)
    return rows["preconditioner"].where(optimizers == "sgd", rows["preconditioner"] + " with " + optimizers)


def _values(column: "pd.Series[Any]") -> list[str]:
    """Return the different values of a column as sorted text; a file that was read back has numbers of them."""
    texts = {part for cell in column.dropna().unique() for part in _text(cell).split(_JOIN) if part}
    return sorted(texts, key=lambda text: (len(text), text) if text.isdecimal() else (0, text))


def _text(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _listed(items: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(items[:-1]), items[-1]]))
