"""The records of a campaign's runs as one table."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from kfac_sua.campaign.cell import Cell, CellState, read_state
from kfac_sua.runs.collect import RUN_COLUMNS, run_rows
from kfac_sua.runs.final_table import CollectError
from kfac_sua.runs.metrics import COLUMNS


def collect_cells(root: Path, cells: Sequence[Cell]) -> pd.DataFrame:
    """Return one row per epoch of every run, as ``collect_runs`` does, with its panel and method.

    Unlike ``collect_runs`` it reads given runs, and not all that lie in a directory: runs that an earlier campaign with
    other settings has left there are not read.

    Args:
        root: The names of the runs are their paths from this directory.
        cells: The runs.

    Returns:
        The columns of ``collect_runs`` and, before them, ``panel`` and ``method``.

    Raises:
        CollectError: If one of the runs is missing or has not ended; the message names all of these.
    """
    states = [(cell, read_state(cell)) for cell in cells]
    open_cells = [f"{cell.name} ({_why_open(state)})" for cell, state in states if not state.has_ended]
    if open_cells:
        raise CollectError(
            f"Of {len(cells)} runs, {len(open_cells)} have not ended: {'; '.join(open_cells)}; "
            "the same command goes on."
        )
    rows = [
        {"panel": cell.panel, "method": cell.method} | row
        for cell in cells
        for row in run_rows(root, cell.directory.info)
    ]
    return pd.DataFrame(rows, columns=["panel", "method", *RUN_COLUMNS, *COLUMNS])


def _why_open(state: CellState) -> str:
    return state.status if state.failure is None else f"{state.status}: {state.failure.rstrip('.')}"
