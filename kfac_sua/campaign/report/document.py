"""The report of a campaign: one Markdown document, and the same as a self-contained HTML page."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

import pandas as pd

from kfac_sua.campaign.definition import Campaign, Scale
from kfac_sua.campaign.judge import Verdict
from kfac_sua.campaign.report.paper import CITATION, TITLE, URL, difference_section, limit_section
from kfac_sua.campaign.report.provenance import command_section, dirty_warning, environment_section, timing_warning
from kfac_sua.campaign.report.results import final_problems, final_section, target_section
from kfac_sua.campaign.report.shared import shared_paragraph
from kfac_sua.campaign.report.tuning import tuning_section
from kfac_sua.campaign.report.verdicts import rule_section, verdict_section, verdict_summary
from kfac_sua.campaign.selection import Choice
from kfac_sua.files.atomic import write_atomically
from kfac_sua.markdown import code, count, escape, join
from kfac_sua.report_page import render_html
from kfac_sua.runs.run_info import RunInfo


@dataclasses.dataclass(frozen=True)
class ReportInput:
    """All that a report is computed from.

    Attributes:
        campaign: Panels and methods, with the curves that were trained.
        scale: Name of the scale.
        scale_settings: Its settings.
        device: ``cpu`` or ``cuda``.
        seeds: Number of final runs wanted per curve.
        selection_rule: How the best cell is chosen, as a sentence.
        command: Command of the whole campaign.
        cell_commands: Per panel and method, the command of one final run.
        grid: Rows of ``collect_runs`` of all grid cells, with ``panel`` and ``method``.
        finals: The same of the final runs, of one setting per panel and method.
        choices: The chosen cells.
        targets: Result of ``target_table``.
        verdicts: Results of ``judge``, none for a campaign without claims.
        figures: PNG file per caption, in their order.
        infos: run.json of all runs.
        final_infos: run.json of the final runs.
        overrides: Overrides that the user gave for all runs.
        by_rule: Result of ``rule_table``.
        source_commit: Commit of the source that makes figures and report; it may be later than that of the runs.
    """

    campaign: Campaign
    scale: str
    scale_settings: Scale
    device: str
    seeds: int
    selection_rule: str
    command: str
    cell_commands: Mapping[tuple[str, str], str]
    grid: pd.DataFrame
    finals: pd.DataFrame
    choices: Sequence[Choice]
    targets: pd.DataFrame
    verdicts: Sequence[Verdict]
    figures: Mapping[str, Path]
    infos: Sequence[RunInfo]
    final_infos: Sequence[RunInfo] = ()
    overrides: Sequence[str] = ()
    by_rule: pd.DataFrame = dataclasses.field(default_factory=pd.DataFrame)
    source_commit: str | None = None


def write_report(report: ReportInput, out_dir: Path) -> tuple[Path, Path]:
    """Write report.md, which shows the figures where they lie, and report.html, which contains them.

    The same input gives the same files, byte by byte.

    Args:
        report: What is reported.
        out_dir: Directory of both files, made if missing.

    Returns:
        Paths of report.md and report.html.

    Raises:
        CollectError: If the final runs of a method have several settings, or those of all have several precisions.
        OSError: If a figure cannot be read or a file not be written.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    addresses = {
        caption: quote(Path(os.path.relpath(path, out_dir)).as_posix()) for caption, path in report.figures.items()
    }
    text = _document(report, addresses)
    files = {addresses[caption]: path for caption, path in report.figures.items()}
    page = render_html(text, report.campaign.title, files)
    paths = out_dir / "report.md", out_dir / "report.html"
    for path, content in zip(paths, (text, page), strict=True):
        write_atomically(path, content.encode())
    return paths


def _document(report: ReportInput, addresses: Mapping[str, str]) -> str:
    """Return the report in Markdown."""
    campaign, grid, finals = report.campaign, report.grid, report.finals
    sections = {
        "Verdicts": join([verdict_section(report.verdicts), rule_section(report.by_rule)]),
        "Figures": join([f"![{escape(caption)}]({url})\n\n*{escape(caption)}*" for caption, url in addresses.items()]),
        "Final numbers": final_section(campaign, finals, report.seeds, report.infos),
        "Time to the baseline's level": target_section(campaign, report.targets),
        "Tuning": tuning_section(campaign, grid, report.choices, report.selection_rule, report.infos),
        "What differs from the paper": difference_section(campaign, finals, report.infos),
        "Limits": limit_section(finals, has_claims=bool(report.verdicts)),
        "Hardware, versions and commit": environment_section(grid, finals, report.infos, report.source_commit),
        "Commands": command_section(
            campaign, report.scale_settings, report.overrides, report.command, report.cell_commands
        ),
    }
    blocks = [f"# {escape(campaign.title)}", *_opening(report)]
    blocks += [join([f"## {heading}", body]) for heading, body in sections.items() if body]
    return join(blocks) + "\n"


def _opening(report: ReportInput) -> list[str]:
    """Return the first paragraphs: what the report is about, and what a reader must know before any number."""
    curves = sum(len(panel.curves) for panel in report.campaign.panels)
    grid_runs, final_runs = (frame["run"].nunique() for frame in (report.grid, report.finals))
    about = (
        f"Campaign {code(report.campaign.name)} at scale {code(report.scale)} on {code(report.device)}, after"
        f" [{CITATION}, *{TITLE}*]({URL}). {count(grid_runs, 'grid run')} chose the learning rate, and the damping"
        f" where there is one, of {count(curves, 'curve')}; {count(final_runs, 'final run')} trained the chosen"
        f" settings, {count(report.seeds, 'seed')} each. Every number below is computed from the records of these runs."
    )
    summary = verdict_summary(report.verdicts)
    problems = final_problems(report.campaign, report.finals, report.seeds)
    untested = [claim for claim in report.campaign.claims if claim not in {v.claim for v in report.verdicts}]
    if untested:
        summary += f" Not tested, for want of curves: {escape(', '.join(untested))}."
    if summary and report.scale != "full":
        summary += f" These are verdicts at scale {code(report.scale)} on this device, not at the paper's own size."
    warnings = [dirty_warning(report.infos), timing_warning(report.final_infos)]
    shared = shared_paragraph(report.campaign, report.finals)
    return [about, shared, f"Verdicts: {summary}" if summary else "", problems, *warnings]
