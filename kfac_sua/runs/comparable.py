"""Whether the seconds of runs can be compared: what they depend on beside the method, and where runs differ in it.

Precision is not treated here: figures and reports refuse runs of several precisions (``require_one_precision``), and
tables separate them.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd

from kfac_sua.markdown import listed
from kfac_sua.runs.run_info import ENDED, RunInfo
from kfac_sua.runs.summary import APART

_JOIN = "; "  # between the values of one run, or of the runs of one row; no name of a device or machine contains it
_MAX_NAMED = 3  # values of one method that a sentence names; more, such as the nodes of a cluster, are only counted


@dataclasses.dataclass(frozen=True)
class Circumstance:
    """Something that a run's seconds depend on and that is no part of its method.

    Attributes:
        values: Returns the values of a run: several if it was resumed elsewhere, none if they were not recorded.
        plural: Noun for several values.
        preposition: The word before the values in a sentence.
        unit: For numbers, the noun for one and for several.
        verdict: What follows "Seconds" in the caution about runs that differ.
    """

    values: Callable[[RunInfo], Sequence[Any]]
    plural: str
    preposition: str
    unit: tuple[str, str] | None = None
    verdict: str = "are not comparable"

    def phrase(self, values: Sequence[str], *, is_first: bool) -> str:
        """Return the phrase about one method, such as ``with 2 CPU threads``.

        Args:
            values: The different values, at least one.
            is_first: Whether this is the first phrase of the sentence; only the first one has the unit.
        """
        if self.unit is None:
            what = listed(values) if len(values) <= _MAX_NAMED else f"{len(values)} {self.plural}"
        else:
            what = listed(values) + (f" {self.unit[list(values) != ['1']]}" if is_first else "")
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
        Text by the names in ``CIRCUMSTANCES``; empty for what was not recorded.
    """
    return {name: _JOIN.join(map(str, each.values(info))) for name, each in CIRCUMSTANCES.items()}


def circumstances_of(rows: pd.DataFrame) -> dict[str, str]:
    """Return the columns of one row that summarises several runs.

    Args:
        rows: Rows of ``collect_runs``; older tables may lack these columns.
    """
    return {name: _JOIN.join(_values(rows[name])) if name in rows else "" for name in CIRCUMSTANCES}


def seconds_cautions(frame: pd.DataFrame) -> list[str]:
    """Return why the seconds of the methods in a table cannot be compared, a sentence each.

    Methods are compared within one panel or, in tables without panels, within one network, data set and precision.

    Args:
        frame: Rows of ``collect_runs``, or any table with the columns in ``CIRCUMSTANCES``. A column that an older
            table lacks, or a value that an older run did not record, counts as no difference.

    Returns:
        The sentences; none if nothing differs, or if there is only one method.
    """
    if "status" in frame:  # seconds of other runs are not shown
        frame = frame[frame["status"].isin(ENDED)]
    keys = ["panel"] if "panel" in frame else [name for name in APART if name in frame]
    groups_by_difference: dict[tuple[str, str], list[str]] = {}
    groups = {", ".join(map(_text, key)): rows for key, rows in frame.groupby(keys, sort=False, dropna=False)}
    for group, rows in groups.items():
        for difference in _differences(rows):
            groups_by_difference.setdefault(difference, []).append(group)
    return [
        f"Seconds{'' if len(found) == len(groups) else f' of {listed(found)}'} {verdict}: {who}."
        for (verdict, who), found in groups_by_difference.items()
    ]


def _differences(rows: pd.DataFrame) -> list[tuple[str, str]]:
    """Return verdict and subject for each circumstance in which the methods of one group differ."""
    methods = _methods(rows)
    if methods.nunique() < 2:
        return []
    found = [name for name in CIRCUMSTANCES if name in rows and len(_values(rows[name])) > 1]
    if "device_name" in found and "machines" in found:
        found.remove("machines")  # the name of a machine includes its device
    return [(CIRCUMSTANCES[name].verdict, _who(CIRCUMSTANCES[name], rows[name], methods)) for name in found]


def _who(circumstance: Circumstance, column: "pd.Series[Any]", methods: "pd.Series[str]") -> str:
    """Return which methods ran with what, grouped by value: ``baseline ran with 2 CPU threads, sua with 1``."""
    by_values: dict[tuple[str, ...], list[str]] = {}
    for method, cells in column.groupby(methods, sort=False):
        if values := tuple(_values(cells)):
            by_values.setdefault(values, []).append(str(method))
    parts = [
        f"{listed(names)} {'' if index else 'ran '}{circumstance.phrase(values, is_first=not index)}"
        for index, (values, names) in enumerate(by_values.items())
    ]
    return (", " if max(map(len, by_values.values())) == 1 else "; ").join(parts)


def _methods(rows: pd.DataFrame) -> "pd.Series[str]":
    """Return the method of each row; comparators differ from the baseline in their optimizer only."""
    if "method" in rows:
        return rows["method"]
    optimizers = pd.Series(rows.get("optimizer", "sgd"), index=rows.index, dtype=object)
    return rows["preconditioner"].where(optimizers == "sgd", rows["preconditioner"] + " with " + optimizers)


def _values(column: "pd.Series[Any]") -> list[str]:
    """Return the different values of a column as sorted text; a table read from a file may hold them as numbers."""
    texts = {part for cell in column.dropna().unique() for part in _text(cell).split(_JOIN) if part}
    return sorted(texts, key=lambda text: (len(text), text) if text.isdecimal() else (0, text))


def _text(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
