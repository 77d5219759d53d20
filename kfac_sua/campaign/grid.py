"""The grid over learning rate and damping that tunes one curve, and its growth beyond an edge."""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping
from decimal import Decimal

from omegaconf import OmegaConf

from kfac_sua.config import CONFIG_DIR, ConfigError

# How far the ratio of two values may lead beside a third one, in steps of the grid: 3 stands for √10, and
# 0.1 · 0.1/0.03 is 0.09 steps off 0.3; in a ladder 1, 2, 5 it is at most 0.25.
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
        """Say on which edges of the grid a cell lies, such as ``lr 0.003 is the lowest tried``.

        An axis with a single value is a choice of whoever made the grid, and has no edge.
        """
        return tuple(text for _, text in self._edges(lr, damping))

    def grown(self, lr: float, damping: float | None) -> "Grid":
        """Return the grid with one more value beyond every edge on which a cell lies; itself if on none.

        The new value continues the ratio of the two outermost ones, on the digits that the grid has in other decades.
        """
        axes = {LR: self.lr, DAMPING: self.damping}
        for (key, is_highest), _ in self._edges(lr, damping):
            axes[key] = _extended(axes[key] or (), is_highest)
        return Grid(axes[LR] or (), axes[DAMPING])

    def most_grown(self, steps: int) -> int:
        """Return how many cells so many steps of growth add at most: one value per step beyond an edge per axis."""
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


def _extended(values: tuple[float, ...], is_highest: bool) -> tuple[float, ...]:
    if is_highest:
        return (*values, _next(values[-1], values[-1] / values[-2], values))
    return (_next(values[0], values[0] / values[1], values), *values)


def _next(value: float, ratio: float, values: tuple[float, ...]) -> float:
    """Return the value after one of a grid, with the digits of another decade: after 0.03, 0.1 comes 0.3, not 0.33."""
    exact = value * ratio
    rungs = (Decimal(repr(other)).scaleb(round(math.log10(exact / other))) for other in values)
    nearest = min(map(float, rungs), key=lambda rung: abs(math.log(rung / exact)))
    is_rung = abs(math.log(nearest / exact)) < SAME_RUNG * abs(math.log(ratio))
    return nearest if is_rung else float(f"{exact:.1e}")
