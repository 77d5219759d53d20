"""The verdicts on the paper's claims, as Markdown."""

import math
from collections.abc import Sequence

import pandas as pd

from kfac_sua.campaign.judge import Part, Verdict
from kfac_sua.markdown import NOTHING, bounds, code, escape, join, listed, number, table

_DIGITS, _DECIMALS = 3, 3  # of ratios and of differences in percentage points; few seeds support no more


def verdict_summary(verdicts: Sequence[Verdict]) -> str:
    """Return one line with the outcome of every claim; empty without claims."""
    phrases = [f"{escape(v.claim)} {'is ' if v.outcome == 'undecided' else ''}**{v.outcome}**" for v in verdicts]
    return f"{listed(phrases)}." if phrases else ""


def verdict_section(verdicts: Sequence[Verdict]) -> str:
    """Return a table of all claims, and per claim every number that enters its verdict.

    Args:
        verdicts: Results of ``claims.judge``; none for a campaign that decides no claim.
    """
    if not verdicts:
        return "These curves decide none of the paper's claims, so there is no verdict."
    columns = [
        ("Claim", "left"),
        ("Statement", "left"),
        ("Verdict", "left"),
        ("Decided by", "left"),
        ("Seeds", "right"),
    ]
    rows = [[escape(v.claim), escape(v.statement), f"**{v.outcome}**", _deciding(v), str(v.seeds)] for v in verdicts]
    rule = (
        "A claim holds if all its parts hold, does not hold if one does not, and is undecided otherwise. A part is"
        " decided only if its value and its whole 95 % interval lie on one side of the threshold. Seeds are those of"
        " the method with the fewest. An end “never” of an interval, or 0.00 beside it, comes from resamples in which a"
        " method never reaches the target."
    )
    return join([table(columns, rows), rule, *(_claim_details(verdict) for verdict in verdicts)])


def rule_section(by_rule: pd.DataFrame) -> str:
    """Return the deciding numbers under every selection rule, from the runs of the grid; empty without claims.

    Args:
        by_rule: Result of ``rule_table``.
    """
    if by_rule.empty:
        return ""
    rules = [name for name in by_rule.columns if name not in ("claim", "part", "threshold")]
    columns = [("Claim", "left"), ("Part", "left"), ("Needed", "right"), *((code(rule), "right") for rule in rules)]
    rows = [
        [row["claim"], escape(row["part"]), escape(row["threshold"])]
        + [number(float(row[rule]), _DIGITS, _DECIMALS) for rule in rules]
        for _, row in by_rule.iterrows()
    ]
    text = (
        "The same numbers between the cells that each selection rule would choose, from the runs of the grid: one seed"
        " and the grid's epochs, so without intervals, and side by side on the device, so without seconds. A verdict"
        " whose number crosses its threshold from one column to another hangs on the rule, which the intervals above do"
        " not contain."
    )
    return join(["### How much hangs on the selection rule", text, table(columns, rows)])


def _deciding(verdict: Verdict) -> str:
    """Return the parts that decide the verdict: those with its outcome."""
    parts = [part for part in verdict.parts if part.outcome == verdict.outcome] or list(verdict.parts)
    texts = [f"{escape(part.text)}: {_part_value(part)}, needed {escape(part.threshold)}" for part in parts]
    return "<br>".join(f"• {text}" for text in texts) if len(texts) > 1 else "".join(texts)


def _part_value(part: Part) -> str:
    interval = bounds(part.low, part.high, _DIGITS, _DECIMALS)
    value = "no value" if math.isnan(part.value) else number(part.value, _DIGITS, _DECIMALS)
    return value if interval == NOTHING else f"{value} ({interval})"


def _claim_details(verdict: Verdict) -> str:
    columns = [
        *(("Part", "left"), ("Value", "right"), ("95 % interval", "right")),
        *(("Needed", "right"), ("Outcome", "left")),
    ]
    rows = [
        [
            escape(part.text),
            number(part.value, _DIGITS, _DECIMALS),
            bounds(part.low, part.high, _DIGITS, _DECIMALS),
            escape(part.threshold),
            f"**{part.outcome}**",
        ]
        for part in verdict.parts
    ]
    heading = f"### {escape(verdict.claim)}: {escape(verdict.statement.rstrip('.'))}"
    return join([heading, table(columns, rows), escape(verdict.note)])
