"""The final table as text: a row per setting, a line above with what all rows share, at most 100 columns wide."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from kfac_sua.runs.run_info import UNENDED

MAX_WIDTH = 100  # columns: fits a terminal beside an editor, an e-mail and an issue without broken lines

# Runs that differ in these are not compared: each combination has its own table.
APART = ("dataset", "model", "width", "precision")
# Columns if rows differ in them. If the table is too wide, it is split by these instead, beginning with the last.
_GIVE_WAY = ("optimizer", "schedule", "epochs")
# Heading of a quantity, its name in ``final_table``, and whether it is a fraction shown in percent.
_QUANTITIES = (
    ("train loss", "train_loss", False),
    ("val error %", "best_val_error", True),
    ("test error %", "test_error", True),
    ("s/epoch", "seconds_per_epoch", False),
)
_NOTHING = "–"
_NO_BREAK = "\xa0"  # ``textwrap`` does not break a line here


def format_table(table: pd.DataFrame) -> str:
    """Return the result of ``final_table`` as text: mean ± standard deviation over the finished seeds.

    Settings that all rows share stand in the line above them. The training loss is that of the last epoch, in nats; the
    validation error is the lowest of any epoch.

    Args:
        table: Result of ``final_table``; rows keep their order.

    Returns:
        Lines for a terminal of ``MAX_WIDTH`` columns, without a newline at the end.
    """
    epochs = table["epochs_mean"].dropna().unique()  # empty if no run has finished
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


def says_group_size(rows: pd.DataFrame) -> bool:
    """Return whether the channels per group have to be told: there are several, or the width may have scaled them.

    Args:
        rows: Rows of ``collect_runs`` or of ``final_table``; older tables lack ``group_size`` or ``width``.
    """
    if "group_size" not in rows:
        return False
    grouped = rows[rows["group_size"].notna()]
    return grouped["group_size"].nunique() > 1 or ("width" in rows and bool((grouped["width"] != 1).any()))


def _one_table(rows: pd.DataFrame, *, is_brief: bool) -> str:
    """Return a table with the line above it."""
    settings = {name: cells for name, cells in _settings(rows).items() if set(cells) != {_NOTHING}}
    shared = {name: cells[0] for name, cells in settings.items() if len(set(cells)) == 1}
    columns = {name: cells for name, cells in settings.items() if name not in shared and name != "seeds"}
    distinguishing = [cells for name, cells in columns.items() if name != "runs"]
    if len(rows) == 1:
        columns = {"method": [shared.pop("method")]} | columns
    elif len(set(zip(*distinguishing, strict=True))) < len(rows):  # some rows differ in a key that has no column
        digits = {"setting": [fingerprint[:8] for fingerprint in rows["fingerprint"]]}
        columns = {name: columns[name] for name in ("method",) if name in columns} | digits | columns
    if "seeds" in shared and shared.get("runs", "").isdecimal():  # all runs have finished
        del shared["runs"]
    # The measured quantities; if brief, only means, and no test error.
    columns |= {
        heading: [
            _spread(row[f"{name}_mean"], math.nan if is_brief else row[f"{name}_std"], is_percent)
            for _, row in rows.iterrows()
        ]
        for heading, name, is_percent in _QUANTITIES
        if not is_brief or name != "test_error"
    }
    # The heading is what all rows share, in one line if it fits.
    first = rows.iloc[0]
    width = "" if first.get("width", 1.0) == 1 else f" (width {first['width']:g})"
    phrases = [f"{first['model']}{width} on {first['dataset']}", *(_phrase(*each) for each in shared.items())]
    unbroken = ", ".join(phrase.replace(" ", _NO_BREAK) for phrase in phrases)
    heading = "\n".join(textwrap.wrap(unbroken, MAX_WIDTH)).replace(_NO_BREAK, " ")
    return "\n".join([heading, *_aligned(columns)])


def _settings(rows: pd.DataFrame) -> dict[str, list[str]]:
    """Return the settings of the rows as text."""
    names = {"preconditioner": "method", "base_lr": "lr", "group_size": "group size"}
    order = (
        "preconditioner",
        "optimizer",
        "schedule",
        "precision",
        "epochs",
        "base_lr",
        "damping",
        "group_size",
        "seeds",
    )
    if "group_size" in rows and not says_group_size(rows):
        rows = rows.drop(columns="group_size")
    found = {names.get(name, name): [_text(value) for value in rows[name]] for name in order if name in rows}
    return found | {"runs": [_count_text(row) for _, row in rows.iterrows()]}


def _phrase(name: str, text: str) -> str:
    """Return a setting as a phrase for the heading."""
    if name == "epochs":
        return f"{text} epoch{'' if text == '1' else 's'}"
    if name == "seeds":
        return f"seed{'' if text.isdecimal() else 's'} {text}"
    phrases = {
        "schedule": f"{text} learning rate",
        "lr": f"lr {text}",
        "damping": f"damping {text}",
        "group size": f"groups of {text}",
    }
    return phrases.get(name, f"runs: {text}" if name == "runs" else text)


def _aligned(columns: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the lines of a table: the first column aligned to the left, the others to the right."""
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
    """Return ``mean ± std``, or the mean if std is NaN or 0: percentages with one decimal, others with three digits."""
    if math.isnan(mean):
        return _NOTHING
    text, deviation = (
        (f"{100 * mean:.1f}", f"{100 * std:.1f}") if is_percent else (f"{mean:#.3g}".rstrip("."), f"{std:.1g}")
    )
    return text if math.isnan(std) or std == 0 else f"{text} ± {deviation}"
