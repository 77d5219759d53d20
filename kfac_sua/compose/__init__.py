"""From command-line overrides to checked configurations: one run, or every cell of a sweep."""

from kfac_sua.compose.cells import MAX_CELLS, Cells, check_overrides, compose_cells
from kfac_sua.compose.composition import compose_config, composed_hydra, group_options, to_config
from kfac_sua.compose.overrides import quoted

__all__ = [
    "MAX_CELLS",
    "Cells",
    "check_overrides",
    "compose_cells",
    "compose_config",
    "composed_hydra",
    "group_options",
    "quoted",
    "to_config",
]
