"""Which runs a campaign consists of: the grid of every curve, and the final runs of what was chosen from it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kfac_sua.campaign.cell import Cell, Stage, make_cell
from kfac_sua.campaign.definition import GROUP_SIZE, Campaign, Curve, Scale
from kfac_sua.campaign.grid import Grid, load_grid
from kfac_sua.compose import quoted
from kfac_sua.config import ConfigError, KroneckerConfig
from kfac_sua.device import device_type
from kfac_sua.runs.directory import resolved

# A curve of a campaign: the names of its panel and its method.
CurveKey = tuple[str, str]

GRID_SEED = 0

# Keys that make a curve, a cell or a directory of a campaign, which a user can therefore not give for all runs.
RESERVED = {
    **dict.fromkeys(("optimizer.lr", "preconditioner.damping"), "comes from the grids of configs/sweep"),
    **dict.fromkeys(("experiment", "preconditioner", "optimizer", "sweep"), "makes the curves (configs/campaign)"),
    **{"scale": "is given as --scale", "seed": "is given as --seeds", "output_dir": "is given as --out"},
    "progress": "is the campaign's own",
}


@dataclass(frozen=True)
class Plan:
    """A campaign at one scale, in one directory.

    Attributes:
        campaign: The campaign, with the wanted curves only.
        scale: The scale.
        root: Directory of all its files.
        seeds: Number of final runs per curve, with seeds 0, 1, ….
        overrides: Overrides of every run, after all others.
    """

    campaign: Campaign
    scale: Scale
    root: Path
    seeds: int
    overrides: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check the overrides.

        Raises:
            ConfigError: If one is not of the form key=value, or its key is the campaign's own.
        """
        for override in self.overrides:
            key, is_pair, _ = override.partition("=")
            if not is_pair:
                raise ConfigError(f"The argument '{override}' cannot be read as key=value.")
            if key in RESERVED:
                raise ConfigError(f"{override} cannot be given for all runs of a campaign: {key} {RESERVED[key]}.")

    def curves(self) -> dict[CurveKey, Curve]:
        """Return all curves, panel by panel."""
        return {(panel.name, curve.method): curve for panel in self.campaign.panels for curve in panel.curves}

    def grids(self) -> dict[CurveKey, Grid]:
        """Return the grid that each curve starts from.

        Raises:
            ConfigError: If the scale has no sweep for a curve, or the sweep cannot be read.
        """
        return {key: load_grid(self._sweep(curve)) for key, curve in self.curves().items()}

    def check(self) -> None:
        """Compose every curve's runs, so that a typo ends before anything is written.

        Raises:
            ConfigError: If a run cannot be configured, the label of a curve names groups that its runs do not have, or
                the final runs, whose seconds are compared, would be of several precisions.
        """
        grids = self.grids()
        self.all_grid_cells(grids)
        cells = self.final_cells({key: next(grid.points()) for key, grid in grids.items()})
        for cell in cells:
            label, own = self.curves()[cell.curve].label, cell.config.preconditioner
            has_groups = isinstance(own, KroneckerConfig) and own.group_size is not None
            if label and GROUP_SIZE in label and not has_groups:
                raise ConfigError(
                    f"The label '{label}' of {cell.method} in panel {cell.panel} of {self.campaign.name} names the "
                    f"channels per group, but preconditioner={own.name} has no groups; leave {GROUP_SIZE} out."
                )
        precisions = sorted({resolved(cell.config, device_type(cell.config.device))["precision"] for cell in cells})
        if len(precisions) > 1:
            raise ConfigError(
                f"The curves of {self.campaign.name} compute in {' and '.join(precisions)}, but seconds are compared"
                " within one precision only; give one for all runs, such as precision=float32."
            )

    def grid_cells(self, key: CurveKey, grid: Grid) -> list[Cell]:
        """Return the runs of the grid of one curve.

        Raises:
            ConfigError: If one of them cannot be run.
        """
        base = self._overrides(key, Stage.grid)
        return [
            make_cell(Stage.grid, key, base, lr=lr, damping=damping, seed=GRID_SEED) for lr, damping in grid.points()
        ]

    def all_grid_cells(self, grids: Mapping[CurveKey, Grid]) -> list[Cell]:
        """Return the runs of the grids of all curves."""
        return [cell for key, grid in grids.items() for cell in self.grid_cells(key, grid)]

    def final_cells(self, chosen: Mapping[CurveKey, tuple[float, float | None]]) -> list[Cell]:
        """Return the final runs: seed by seed, so that a machine that slows down or warms up does so for all curves.

        Args:
            chosen: Learning rate and damping per curve.
        """
        return [
            make_cell(Stage.final, key, self._overrides(key, Stage.final), lr=lr, damping=damping, seed=seed)
            for seed in range(self.seeds)
            for key, (lr, damping) in chosen.items()
        ]

    def _overrides(self, key: CurveKey, stage: Stage) -> Sequence[str]:
        by_stage = [*self.scale.run, *(self.scale.grid if stage is Stage.grid else [])]
        output_dir = f"output_dir={quoted(str(self.root / stage))}"
        overrides = [*self.curves()[key].overrides, *by_stage, *self.overrides, output_dir, "progress=lines"]
        # The last value of each key, at the place of its first, as Hydra would read them.
        return list({override.partition("=")[0]: override for override in overrides}.values())

    def _sweep(self, curve: Curve) -> str:
        if curve.tuning not in self.scale.sweeps:
            known = ", ".join(self.scale.sweeps)
            raise ConfigError(f"{curve.method} is tuned over '{curve.tuning}', but this scale has grids for {known}.")
        return self.scale.sweeps[curve.tuning]
