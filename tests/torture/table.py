"""Results of all cases, as one table."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

COLUMNS = ("campaign", "fault", "tried", "survived", "work lost (steps): median", "max", "wrong results")


@dataclass(frozen=True)
class Result:
    """What became of one case.

    Attributes:
        campaign: Its campaign.
        fault: Kind of fault: a row of the table.
        case: Its name, with which it can be repeated.
        tried: Faults brought about.
        survived: Faults after which all was as it must be.
        wrong: Results that were wrong, with nothing said about it.
        lost: Steps that had to be repeated, per fault that may cost some.
        problem: What was not as it must be; empty if nothing.
    """

    campaign: str
    fault: str
    case: str
    tried: int = 1
    survived: int = 1
    wrong: int = 0
    lost: tuple[int, ...] = ()
    problem: str = ""

    @property
    def is_good(self) -> bool:
        """Whether everything was as it must be."""
        return self.survived == self.tried and self.wrong == 0


Row = tuple[str, str, int, int, str, str, int]


def rows(results: Sequence[Result]) -> list[Row]:
    """Return one row per kind of fault, in the order in which they first appear, and their sum."""
    kinds = dict.fromkeys((result.campaign, result.fault) for result in results)
    table = [
        _row(campaign, fault, [r for r in results if (r.campaign, r.fault) == (campaign, fault)])
        for campaign, fault in kinds
    ]
    return [*table, _row("all", "", results)]


def _row(campaign: str, fault: str, results: Sequence[Result]) -> Row:
    lost = [steps for result in results for steps in result.lost]
    return (
        campaign,
        fault,
        sum(result.tried for result in results),
        sum(result.survived for result in results),
        f"{median(lost):g}" if lost else "–",
        str(max(lost)) if lost else "–",
        sum(result.wrong for result in results),
    )


def as_markdown(results: Sequence[Result]) -> str:
    """Return the table as Markdown, columns aligned."""
    cells = [COLUMNS, *([str(value) for value in row] for row in rows(results))]
    widths = [max(len(row[index]) for row in cells) for index in range(len(COLUMNS))]
    lines = ["| " + " | ".join(_padded(row, widths)) + " |" for row in cells]
    rule = (
        "|"
        + "|".join("-" * (width + 2) if index < 2 else "-" * (width + 1) + ":" for index, width in enumerate(widths))
        + "|"
    )
    return "\n".join([lines[0], rule, *lines[1:]]) + "\n"


def as_csv(results: Sequence[Result]) -> str:
    """Return the table as CSV."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows(rows(results))
    return text.getvalue()


def _padded(row: Sequence[str], widths: Sequence[int]) -> list[str]:
    return [f"{cell:<{w}}" if i < 2 else f"{cell:>{w}}" for i, (cell, w) in enumerate(zip(row, widths, strict=True))]
