"""The grid over learning rate and damping that tunes one curve, and its growth beyond an edge."""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping
from decimal import Decimal

from omegaconf import OmegaConf

from kfac_sua.config import CONFIG_DIR, ConfigError

# How far from a value of another decade the next value may lie to be rounded to it, in steps of the grid. A grid
# 1, 3, 10 has 3 for √10, so that 0.1 · 0.1/0.03 is 0.09 steps off 0.3; in a grid 1, 2, 5, 10 it is at most 0.25 steps.
SAME_RUNG = 0.3

LR, DAMPING = "optimizer.lr", "preconditioner.damping"


@dataclasses.dataclass(frozen=True)
class Grid:
    """A product of learning rates and dampings.

    Attributes:
        lr: Learning rates, ascending.
        damping: Dampings, ascending; None for a method without.
    """

    lr: tuple[float, ...]
    damping: tuple[float, ...] | None

    def points(self) -> Iterator[tuple[float, float | None]]:
        """Yield learning rate and damping of every cell."""
        yield from itertools.product(self.lr, self.damping or (None,))

    def edges(self, lr: float, damping: float | None) -> tuple[str, ...]:
        """Return on which edges of the grid a cell lies, such as ``lr 0.003 is the lowest tried``.

        An axis with a single value has no edge, as the author of the grid has chosen that value.
        """
        return tuple(text for _, text in self._edges(lr, damping))

    def grown(self, lr: float, damping: float | None) -> "Grid":
        """Return the grid with one more value beyond every edge on which a cell lies; the same grid if it is on none.

        The new value continues the ratio of the two outermost ones, and takes digits of the grid's other decades.
        """
        axes = {LR: self.lr, DAMPING: self.damping}
        for (key, is_highest), _ in self._edges(lr, damping):
            values = axes[key] or ()
            if is_highest:
                axes[key] = (*values, _next(values[-1], values[-1] / values[-2], values))
            else:
                axes[key] = (_next(values[0], values[0] / values[1], values), *values)
        return Grid(axes[LR] or (), axes[DAMPING])

    def most_grown(self, steps: int) -> int:
        """Return the most cells that some steps of growth add: each adds at most one value to an axis."""
        axes = [len(axis) for axis in (self.lr, self.damping) if axis is not None]
        return math.prod(size + steps * (size > 1) for size in axes) - math.prod(axes)

    def _edges(self, lr: float, damping: float | None) -> Iterator[tuple[tuple[str, bool], str]]:
        for key, name, values, value in ((LR, "lr", self.lr, lr), (DAMPING, "damping", self.damping, damping)):
            if values is None or value is None or len(values) < 2:
                continue
            if value == values[0]:
                yield (key, False), f"{name} {value:g} is the lowest tried"
            if value == values[-1]:
                yield (key, True), f"{name} {value:g} is the highest tried"


def load_grid(sweep: str) -> Grid:
    """Return the grid that a file of ``configs/sweep`` holds.

    Args:
        sweep: Name of the file, without its ending.

    Raises:
        ConfigError: If there is no such file, or it sweeps over anything but learning rate and damping.
    """
    path = CONFIG_DIR / "sweep" / f"{sweep}.yaml"
    if not path.exists():
        known = ", ".join(sorted(other.stem for other in path.parent.glob("*.yaml")))
        raise ConfigError(f"There is no sweep '{sweep}'; choose one of {known}.")
    content = OmegaConf.load(path)
    node = content.hydra if "hydra" in content else content
    params: Mapping[str, object] = node.sweeper.params
    if not {LR} <= set(params) <= {LR, DAMPING}:
        raise ConfigError(f"{path.name} must sweep over {LR} and perhaps {DAMPING}, got {', '.join(params)}.")
    damping = _values(sweep, params[DAMPING]) if DAMPING in params else None
    return Grid(_values(sweep, params[LR]), damping)


def _values(sweep: str, text: object) -> tuple[float, ...]:
    try:
        values = {float(part) for part in str(text).split(",")}
    except ValueError as error:
        raise ConfigError(f"sweep={sweep} must hold numbers separated by commas, got '{text}'.") from error
    return tuple(sorted(values))


def _next(value: float, ratio: float, values: tuple[float, ...]) -> float:
    """Return the value after the last of a grid, with digits of another decade: after 0.03, 0.1 it is 0.3, not 0.33."""
    exact = value * ratio
    rungs = (Decimal(repr(other)).scaleb(round(math.log10(exact / other))) for other in values)
    nearest = min(map(float, rungs), key=lambda rung: abs(math.log(rung / exact)))
    is_rung = abs(math.log(nearest / exact)) < SAME_RUNG * abs(math.log(ratio))
    return nearest if is_rung else float(f"{exact:.1e}")
