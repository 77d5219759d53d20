"""The table of many runs for a person: a row per setting, what all rows share in a line above, 100 columns at most."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from kfac_sua.runs.run_info import UNENDED

MAX_WIDTH = 100  # columns: what a terminal beside an editor, a message and an issue show without breaking lines

# Runs that differ in these are not compared, and have a table of their own.
APART = ("dataset", "model", "width", "precision")
# Columns where rows differ in them; the last ones are the first to give way to tables of their own where all are wide.
_GIVE_WAY = ("optimizer", "schedule", "epochs")
# Heading of a quantity, its name in ``final_table``, and whether it is a fraction that is shown in percent.
_QUANTITIES = (
    ("train loss", "train_loss", False),
    ("val error %", "best_val_error", True),
    ("test error %", "test_error", True),
    ("s/epoch", "seconds_per_epoch", False),
)
_NOTHING = "–"
_NO_BREAK = "\xa0"  # where ``textwrap`` makes no new line


def format_table(table: pd.DataFrame) -> str:
    """Return the result of ``final_table`` as text: mean ± standard deviation over the finished seeds.

    What is the same in all rows is said once, above them. The training loss is that of the last epoch in nats, the
    validation error the lowest of any epoch.

    Args:
        table: Result of ``final_table``; rows keep their order.

    Returns:
        Lines for a terminal of ``MAX_WIDTH`` columns, without a newline at the end.
    """
    epochs = table["epochs_mean"].dropna().unique()  # none where no run has finished
    table = table.assign(epochs=table["epochs_mean"] if len(epochs) > 1 else epochs[0] if len(epochs) else math.nan)
    known = [name for name in (*APART, *_GIVE_WAY) if name in table and table[name].nunique() > 1]
    text = ""
    for num_columns in range(len(_GIVE_WAY), -1, -1):
        apart = [name for name in known if name not in _GIVE_WAY[:num_columns]]
        parts = [rows for _, rows in table.groupby(apart, sort=False, dropna=False)] if apart else [table]
        text = "\n\n".join(_one_table(rows, is_brief=num_columns == 0) for rows in parts)
        if max(map(len, text.splitlines())) <= MAX_WIDTH:
            break
    return text


def _one_table(rows: pd.DataFrame, *, is_brief: bool) -> str:
    """Return a table with the line above it."""
    settings = {name: cells for name, cells in _settings(rows).items() if set(cells) != {_NOTHING}}
    shared = {name: cells[0] for name, cells in settings.items() if len(set(cells)) == 1}
    columns = {name: cells for name, cells in settings.items() if name not in shared and name != "seeds"}
    told_by = [cells for name, cells in columns.items() if name != "runs"]
    if len(rows) == 1:
        columns = {"method": [shared.pop("method")]} | columns
    elif len(set(zip(*told_by, strict=True))) < len(rows):  # they differ in a key that has no column
        digits = {"setting": [fingerprint[:8] for fingerprint in rows["fingerprint"]]}
        columns = {name: columns[name] for name in ("method",) if name in columns} | digits | columns
    if "seeds" in shared and shared.get("runs", "").isdecimal():  # all of these have finished
        del shared["runs"]
    columns |= _quantities(rows, is_brief=is_brief)
    return "\n".join([_heading(rows.iloc[0], shared), *_aligned(columns)])


def _settings(rows: pd.DataFrame) -> dict[str, list[str]]:
    """Return what tells rows apart, as text."""
    names = {"preconditioner": "method", "base_lr": "lr"}
    order = ("preconditioner", "optimizer", "schedule", "precision", "epochs", "base_lr", "damping", "seeds")
    found = {names.get(name, name): [_text(value) for value in rows[name]] for name in order if name in rows}
    return found | {"runs": [_count_text(row) for _, row in rows.iterrows()]}


def _quantities(rows: pd.DataFrame, *, is_brief: bool) -> dict[str, list[str]]:
    """Return the columns of what was measured; the brief ones are means alone, without the test error."""
    return {
        heading: [
            _spread(row[f"{name}_mean"], math.nan if is_brief else row[f"{name}_std"], is_percent)
            for _, row in rows.iterrows()
        ]
        for heading, name, is_percent in _QUANTITIES
        if not is_brief or name != "test_error"
    }


def _heading(first: "pd.Series[Any]", shared: Mapping[str, str]) -> str:
    """Return what all rows share, in one line if it fits."""
    width = "" if first.get("width", 1.0) == 1 else f" (width {first['width']:g})"
    phrases = [f"{first['model']}{width} on {first['dataset']}", *(_phrase(*each) for each in shared.items())]
    unbroken = ", ".join(phrase.replace(" ", _NO_BREAK) for phrase in phrases)
    return "\n".join(textwrap.wrap(unbroken, MAX_WIDTH)).replace(_NO_BREAK, " ")


def _phrase(name: str, text: str) -> str:
    """Return a setting as it is said in a line of others."""
    if name == "epochs":
        return f"{text} epoch{'' if text == '1' else 's'}"
    if name == "seeds":
        return f"seed{'' if text.isdecimal() else 's'} {text}"
    phrases = {"schedule": f"{text} learning rate", "lr": f"lr {text}", "damping": f"damping {text}"}
    return phrases.get(name, f"runs: {text}" if name == "runs" else text)


def _aligned(columns: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the lines of a table: the first column to the left, the others to the right."""
    rows = [list(columns), *map(list, zip(*columns.values(), strict=True))]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([f"{row[0]:<{widths[0]}}", *(f"{c:>{w}}" for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]


def _count_text(row: "pd.Series[Any]") -> str:
    """Return how many runs ended how, such as ``3`` or ``2 +1 diverged``."""
    others = [f" +{row[name]} {name}" for name in ("diverged", *UNENDED) if row[name]]
    return f"{row['finished']}{''.join(others)}"


def _text(value: object) -> str:
    if isinstance(value, float):
        return _NOTHING if math.isnan(value) else f"{value:g}"
    return str(value)


def _spread(mean: float, std: float, is_percent: bool) -> str:
    """Return ``mean ± std``: percentages with one decimal, all else with three digits; the mean alone without std."""
    if math.isnan(mean):
        return _NOTHING
    text, deviation = (
        (f"{100 * mean:.1f}", f"{100 * std:.1f}") if is_percent else (f"{mean:#.3g}".rstrip("."), f"{std:.1g}")
    )
    return text if math.isnan(std) or std == 0 else f"{text} ± {deviation}"
