"""From the results of a campaign to its figures, tables and report in one directory."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import pandas as pd

from kfac_sua.campaign.cell import Cell, each_once, read_cell_info
from kfac_sua.campaign.claims import CLAIMS
from kfac_sua.campaign.conduct import Results
from kfac_sua.campaign.definition import GROUP_SIZE, Campaign, Curve, Panel
from kfac_sua.campaign.judge import judge, rule_table
from kfac_sua.campaign.plan import Plan
from kfac_sua.campaign.report import ReportInput, write_report
from kfac_sua.campaign.selection import RULE_SENTENCES, Rule
from kfac_sua.campaign.targets import target_table
from kfac_sua.config import KroneckerConfig
from kfac_sua.figures.fig1 import draw_figure1
from kfac_sua.figures.fig2 import draw_figure2
from kfac_sua.figures.grid_map import draw_grid_map
from kfac_sua.figures.style import method_styles
from kfac_sua.figures.time_split import draw_time_split
from kfac_sua.figures.time_to_target import draw_time_to_target
from kfac_sua.figures.titles import panel_subjects, subject
from kfac_sua.files.atomic import write_atomically
from kfac_sua.methods import MethodStyle
from kfac_sua.runs.environment import source_commit
from kfac_sua.runs.run_info import RunInfo

_WRITTEN = (".csv", ".png", ".svg", ".md", ".html")


def publish(plan: Plan, *, scale: str, device: str, rule: Rule, results: Results, command: str) -> list[Path]:
    """Write figures, the numbers behind them, the records of all runs as tables, and the report.

    Args:
        plan: The campaign.
        scale: Name of its scale.
        device: ``cpu`` or ``cuda``.
        rule: How the best cells were chosen.
        results: The results of its runs.
        command: The command of the campaign, for the report.

    Returns:
        Paths of report.md and report.html; all other files lie beside them.

    Raises:
        FigureError: If a figure cannot be drawn from the runs.
        CollectError: If the final runs have several precisions; the files of an earlier call are then left.
    """
    targets, claims = target_table(results.finals), _decidable(plan.campaign)
    out_dir = plan.root / "report"
    out_dir.mkdir(parents=True, exist_ok=True)
    for path in out_dir.iterdir():  # files of an earlier call with other curves would pass for this one's
        if path.suffix in _WRITTEN:
            path.unlink()
    for name, runs in (("grid_runs.csv", results.grid), ("final_runs.csv", results.finals)):
        write_atomically(out_dir / name, runs.to_csv(index=False).encode())
    campaign = labelled(titled(plan.campaign, results.finals), [*results.grid_cells, *results.final_cells])
    report = ReportInput(
        campaign=campaign,
        scale=scale,
        scale_settings=plan.scale,
        device=device,
        seeds=plan.seeds,
        selection_rule=RULE_SENTENCES[rule],
        command=command,
        cell_commands={(cell.panel, cell.method): cell.command for cell in reversed(results.final_cells)},
        grid=results.grid,
        finals=results.finals,
        choices=results.choices,
        targets=targets,
        verdicts=[judge(claim, results.finals) for claim in claims],
        figures=_draw(campaign, scale, results, targets, out_dir),
        infos=_infos([*results.grid_cells, *results.final_cells]),
        by_rule=rule_table(results.grid, claims, results.grid_cells[0].config.dataset.validation_size),
        source_commit=source_commit(),
        final_infos=_infos(results.final_cells),
        overrides=plan.overrides,
    )
    return list(write_report(report, out_dir))


def titled(campaign: Campaign, finals: pd.DataFrame) -> Campaign:
    """Return a campaign whose titles name the network and the data set of its runs: another scale has other runs.

    Args:
        campaign: The campaign as defined; its title says which figure or ablation it is.
        finals: Rows of ``collect_cells`` of its final runs.
    """
    titles = panel_subjects(finals)
    panels = [dataclasses.replace(panel, title=titles[panel.name]) for panel in campaign.panels]
    return dataclasses.replace(campaign, title=f"{campaign.title}: {subject(finals)}", panels=panels)


def labelled(campaign: Campaign, cells: Iterable[Cell]) -> Campaign:
    """Return a campaign whose labels have the channels per group of the runs in place of ``GROUP_SIZE``.

    Args:
        campaign: The campaign as defined.
        cells: Its runs.
    """
    sizes = {
        cell.curve: cell.config.preconditioner.channels_per_group(cell.config.model.width)
        for cell in cells
        if isinstance(cell.config.preconditioner, KroneckerConfig)
    }

    def named(panel: Panel, curve: Curve) -> Curve:
        size = sizes.get((panel.name, curve.method))
        if curve.label is None or size is None:
            return curve
        return dataclasses.replace(curve, label=curve.label.replace(GROUP_SIZE, str(size)))

    panels = [
        dataclasses.replace(panel, curves=[named(panel, curve) for curve in panel.curves]) for panel in campaign.panels
    ]
    return dataclasses.replace(campaign, panels=panels)


def _infos(cells: Sequence[Cell]) -> list[RunInfo]:
    """Return run.json of every run, each once."""
    return [read_cell_info(cell) for cell in each_once(cells)]


def _decidable(campaign: Campaign) -> list[str]:
    """Return the claims whose curves are all there, as ``--only`` may have left some out."""
    there = {(panel.name, curve.method) for panel in campaign.panels for curve in panel.curves}
    return [
        claim
        for claim in campaign.claims
        if there >= {(CLAIMS[claim].panel, method) for method in CLAIMS[claim].methods}
    ]


def _draw(campaign: Campaign, scale: str, results: Results, targets: pd.DataFrame, out_dir: Path) -> Mapping[str, Path]:
    """Draw all figures and return the PNG of each by its caption."""
    styles = method_styles(campaign.methods(), campaign.labels())
    panels = [(panel.name, panel.title) for panel in campaign.panels]
    chosen = {(choice.panel, choice.method): choice.fingerprint for choice in results.choices}
    paths = {
        campaign.title: _draw_curves(campaign, scale, panels, results.finals, styles, out_dir),
        "The grid: training loss and validation error per cell; the chosen one is framed.": draw_grid_map(
            results.grid, out_dir, styles=styles, chosen=chosen, panels=panels
        ),
        "Where the time goes: seconds per epoch.": draw_time_split(
            results.finals, out_dir, styles=styles, panels=panels
        ),
    }
    if not targets.empty:  # a campaign without a baseline, such as an ablation, has no targets
        caption = "Time to the baseline's best validation error and final training loss."
        paths[caption] = draw_time_to_target(targets, out_dir, styles=styles, panels=panels)
    return {caption: next(path for path in drawn if path.suffix == ".png") for caption, drawn in paths.items()}


def _draw_curves(
    campaign: Campaign,
    scale: str,
    panels: list[tuple[str, str]],
    finals: pd.DataFrame,
    styles: Mapping[str, MethodStyle],
    out_dir: Path,
) -> list[Path]:
    title = campaign.title if scale == "full" else f"{campaign.title} (scale {scale})"
    if campaign.figure == "fig2":
        return draw_figure2(finals, panels, out_dir, title, styles=styles, name=campaign.name)
    return draw_figure1(finals, out_dir, title, styles=styles, name=campaign.name)
