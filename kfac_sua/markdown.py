"""Markdown from values: rounded numbers, escaped text, tables.

It uses only the Markdown that GitHub and Python-Markdown read alike, so that report.md and report.html say the same.
"""

import math
import re
from collections.abc import Sequence

NOTHING = "–"
NEVER = "never"

# Characters that both dialects take after a backslash. A pipe would end a table cell.
_BACKSLASHED = re.compile(r"[\\`*_{}\[\]|]")
# The position before a mark that would make a list, a heading or a quotation at the start of a block.
_BLOCK_START = re.compile(r"(?=[-+](\s|$|-))|(?=#)|(?=>)|(?<=\d)(?=[.)](\s|$))")
# Characters that only one dialect takes after a backslash: of tags, entities, strike-through and formulas.
_ENTITIES = {"&": "&amp;", "<": "&lt;", "~": "&#126;", "$": "&#36;"}
_SPECIAL = re.compile(r"&(?=#?\w+;)|<(?=[\w/!?])|[~$]")


def escape(text: str) -> str:
    """Return text that Markdown shows as it is, on one line.

    Args:
        text: Any text; line breaks become spaces.

    Returns:
        Markdown that is safe in paragraphs, lists, headings and table cells.
    """
    line = " ".join(text.split())
    digits = len(line) - len(line.lstrip("0123456789"))
    start = _BLOCK_START.match(line, digits)
    mark = "\\" if start else ""
    body = _SPECIAL.sub(lambda match: _ENTITIES[match[0]], _BACKSLASHED.sub(r"\\\g<0>", line[digits:]))
    return f"{line[:digits]}{mark}{body}"


def code(text: str) -> str:
    """Return a code span, not for table cells: a pipe in it would end the cell."""
    fence = "`" * (_longest_backticks(text) + 1)
    space = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{space}{text}{space}{fence}"


def code_block(lines: Sequence[str]) -> str:
    """Return a block of shell commands."""
    text = "\n".join(lines)
    fence = "`" * max(3, _longest_backticks(text) + 1)
    return f"{fence}bash\n{text}\n{fence}"


def table(columns: Sequence[tuple[str, str]], rows: Sequence[Sequence[str]]) -> str:
    """Return a table.

    Args:
        columns: Heading and alignment of each, ``left``, ``right`` or ``center``.
        rows: Cells, already Markdown.

    Returns:
        Lines of Markdown.
    """
    rules = {"left": ":--", "right": "--:", "center": ":-:"}
    lines = [[heading for heading, _ in columns], [rules[alignment] for _, alignment in columns], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def bullets(items: Sequence[str]) -> str:
    """Return a list of items that are already Markdown."""
    return "\n".join(f"- {item}" for item in items)


def join(blocks: Sequence[str]) -> str:
    """Return blocks one below the other, without those that are empty."""
    return "\n\n".join(block for block in blocks if block)


def number(value: float, digits: int = 4, most_decimals: int = 12) -> str:
    """Return a number with as many decimals as its significant digits need; digits before the point all stand.

    Args:
        value: Any float.
        digits: Significant digits.
        most_decimals: Most decimals, however small the number.

    Returns:
        ``never`` for infinity, a dash for NaN.
    """
    if math.isnan(value):
        return NOTHING
    if math.isinf(value):
        return NEVER
    return _signed(f"{value:,.{min(_decimals(value, digits), most_decimals)}f}")


def percent(value: float) -> str:
    """Return a fraction in percent with one decimal."""
    return NOTHING if math.isnan(value) else f"{_signed(f'{100 * value:.1f}')} %"


def spread(mean: float, std: float, digits: int = 4) -> str:
    """Return mean ± standard deviation with the mean's decimals; the mean alone where there is no deviation."""
    if math.isnan(mean) or math.isnan(std):
        return number(mean, digits)
    return f"{number(mean, digits)} ± {_deviation(std, _decimals(mean, digits))}"


def percent_spread(mean: float, std: float) -> str:
    """Return ``spread`` of fractions, in percent with one decimal."""
    if math.isnan(mean) or math.isnan(std):
        return percent(mean)
    return f"{100 * mean:.1f} ± {_deviation(100 * std, 1)} %"


def bounds(low: float, high: float, digits: int = 4, most_decimals: int = 12) -> str:
    """Return an interval; a dash where there is none, ``never`` where both ends are infinite."""
    if math.isnan(low) and math.isnan(high):
        return NOTHING
    if math.isinf(low) and math.isinf(high):
        return NEVER
    return " to ".join(number(end, digits, most_decimals) for end in (low, high))


def count(amount: int, singular: str, plural: str | None = None) -> str:
    """Return an amount with its noun, such as ``1 run`` or ``2 runs``."""
    return f"{amount:,} {singular if amount == 1 else plural or singular + 's'}"


def listed(items: Sequence[str]) -> str:
    """Return items as in a sentence: ``a, b and c``."""
    return " and ".join([", ".join(items[:-1]), items[-1]]) if len(items) > 1 else "".join(items)


def _decimals(value: float, digits: int) -> int:
    """Return the decimals that show some significant digits, after rounding: 9.9996 is 10.00."""
    exponent = int(f"{abs(value):.{digits - 1}e}".partition("e")[2])
    return max(0, digits - 1 - exponent)


def _deviation(std: float, decimals: int) -> str:
    """Return a standard deviation; if it would be shown as zero, with one significant digit."""
    text = f"{std:,.{decimals}f}"
    # Rounding leaves such a deviation of equal numbers.
    return text if float(text.replace(",", "")) or std < 1e-12 else f"{std:.1g}"


def _signed(text: str) -> str:
    """Return a number's text with a minus sign instead of a hyphen, and without one before zero."""
    if not text.startswith("-"):
        return text
    return f"−{text[1:]}" if text.strip("-0.,") else text[1:]


def _longest_backticks(text: str) -> int:
    return max((len(run) for run in re.findall("`+", text)), default=0)
