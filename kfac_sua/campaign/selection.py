"""Which cell of a grid is trained for the figure, by rules on training and validation curves, never the test set."""

import dataclasses
import math
from enum import StrEnum

import pandas as pd

from kfac_sua.campaign.grid import Grid


class SelectionError(Exception):
    """A grid has no cell that could be chosen; the message is one sentence."""


class Rule(StrEnum):
    """How the best cell is chosen."""

    one_standard_error = "one_standard_error"
    val_error = "val_error"
    train_loss = "train_loss"


RULE_SENTENCES = {
    Rule.one_standard_error: (
        "Among the cells whose best validation error lies within one standard error, √(p(1 − p)/n) on n held-out "
        "images, of the lowest one p, the cell with the lowest training loss in its last epoch."
    ),
    Rule.val_error: "The lowest validation error of any epoch; of equal ones, the lowest training loss.",
    Rule.train_loss: "The lowest training loss of the last epoch; of equal ones, the lowest validation error.",
}


@dataclasses.dataclass(frozen=True)
class Choice:
    """The chosen cell of one curve, with the grid that it was chosen from.

    Attributes:
        panel: Name of the panel.
        method: Name of the method.
        lr: Learning rate of the chosen cell.
        damping: Its damping; None for a method without.
        fingerprint: Its setting, as in the grid's records.
        num_cells: Cells tried, including those by which the grid has grown.
        num_diverged: Cells that diverged.
        num_grown: Cells that were added because an earlier choice lay on an edge.
        lr_range: Lowest and highest learning rate tried.
        damping_range: Lowest and highest damping tried; None for a method without.
        train_loss: Training loss of the chosen cell's last epoch, in nats.
        val_error: Lowest validation error of the chosen cell, in [0, 1].
        edges: A clause for each edge on which the choice lies, such as "lr 0.003 is the lowest tried".
    """

    panel: str
    method: str
    lr: float
    damping: float | None
    fingerprint: str
    num_cells: int
    num_diverged: int
    num_grown: int
    lr_range: tuple[float, float]
    damping_range: tuple[float, float] | None
    train_loss: float
    val_error: float
    edges: tuple[str, ...]


def select(runs: pd.DataFrame, curve: tuple[str, str], grids: tuple[Grid, Grid], rule: Rule, val_size: int) -> Choice:
    """Choose the best cell of one curve's grid.

    Args:
        runs: Rows of ``collect_runs``: the grid of this curve, one run per cell, all ended.
        curve: Panel and method.
        grids: The grid at the start, and as it is now.
        rule: How to choose; cells that diverged are never chosen.
        val_size: Number of held-out images, for the standard error.

    Returns:
        The chosen cell, with the grid that it was chosen from.

    Raises:
        SelectionError: If every cell diverged.
    """
    first, grid = grids
    cells = _summarise(runs)
    finished = cells[cells["status"] == "finished"]
    if finished.empty:
        panel, method = curve
        raise SelectionError(
            f"All {len(cells)} cells of the grid of {panel}/{method} diverged (lr {grid.lr[0]:g} to {grid.lr[-1]:g}); "
            "add smaller learning rates or larger dampings to its file in configs/sweep."
        )
    best = _best(finished, rule, val_size)
    damping = None if math.isnan(best["damping"]) else float(best["damping"])
    lr = float(best["base_lr"])
    return Choice(
        panel=curve[0],
        method=curve[1],
        lr=lr,
        damping=damping,
        fingerprint=str(best["fingerprint"]),
        num_cells=len(cells),
        num_diverged=int((cells["status"] == "diverged").sum()),
        num_grown=len(set(grid.points()) - set(first.points())),
        lr_range=(grid.lr[0], grid.lr[-1]),
        damping_range=None if grid.damping is None else (grid.damping[0], grid.damping[-1]),
        train_loss=float(best["train_loss"]),
        val_error=float(best["val_error"]),
        edges=grid.edges(lr, damping),
    )


def best_fingerprint(runs: pd.DataFrame, rule: Rule, val_size: int) -> str | None:
    """Return the setting that a rule chooses from the grid of one curve; None if all of its cells diverged.

    Args:
        runs: As for :func:`select`.
        rule: How to choose.
        val_size: Number of held-out images, for the standard error.
    """
    cells = _summarise(runs)
    finished = cells[cells["status"] == "finished"]
    return None if finished.empty else str(_best(finished, rule, val_size)["fingerprint"])


def _summarise(runs: pd.DataFrame) -> pd.DataFrame:
    """Return one row per cell: its setting, how it ended, its last training loss and its lowest validation error."""
    ordered = runs.sort_values(["fingerprint", "epoch"])
    trained = ordered[(ordered["epoch"] > 0) | (ordered["status"] != "finished")]
    by_cell = trained.groupby("fingerprint", sort=False)
    return by_cell.agg(
        base_lr=("base_lr", "last"),
        damping=("damping", "last"),
        status=("status", "last"),
        train_loss=("train_loss", "last"),
        val_error=("val_error", "min"),
    ).reset_index()


def _best(cells: pd.DataFrame, rule: Rule, val_size: int) -> "pd.Series":
    """Return the best of the finished cells; among equal ones the smallest learning rate, then the largest damping."""
    if rule is Rule.one_standard_error:
        lowest = cells["val_error"].min()
        cells = cells[cells["val_error"] <= lowest + math.sqrt(lowest * (1 - lowest) / val_size)]
    order = ["val_error", "train_loss"] if rule is Rule.val_error else ["train_loss", "val_error"]
    ranked = cells.sort_values([*order, "base_lr", "damping"], ascending=[True, True, True, False], kind="stable")
    return ranked.iloc[0]
