"""What is measured: one convolution per case, along four sweeps, with its blocks and FLOPs counted beforehand.

The layer is C→C, k×k, zero-padded by k//2, without a bias, on ``[N, C, H, H]`` with H = 4: the 4×4 maps on which VGG11
has its 512-channel layers. In channels m, taps k², group size s and rows N·H², a factor has

- K-FAC: one block of width k²m; SUA: one of width m;
- K-FAC in groups: m/s blocks of width k²s; SUA in groups: m/s of width s;

and the gradient factor one block of width m, or m/s of width s.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Literal

from kfac_sua.config import PreconditionerName
from kfac_sua.preconditioner.settings import InverseMethod

IMAGE_SIZE = 4  # pixels, height and width
GROUP_SIZE = 32  # channels; that of Figure 1, for sweeps of other quantities
COSTS = ("forward_backward", "statistics", "inversion", "application")
INVERSE_METHODS = (InverseMethod.cholesky, InverseMethod.auto)

METHODS = (PreconditionerName.kfac, PreconditionerName.sua, PreconditionerName.grouped, PreconditionerName.sua_grouped)
GROUPED = (PreconditionerName.grouped, PreconditionerName.sua_grouped)
TAPS_IN_FEATURES = (PreconditionerName.kfac, PreconditionerName.grouped)

_FLOAT_BYTES = 4
# Dense factors alive at the peak of a refresh: the mean, its damped copy, the triangle, the new and the last inverse.
_COPIES = 5


@dataclasses.dataclass(frozen=True)
class Layer:
    """The convolution and its mini-batch.

    Args:
        channels: Input and output channels.
        kernel_size: Kernel height and width, odd, so that outputs are as large as inputs.
        batch_size: Examples.
    """

    channels: int
    kernel_size: int
    batch_size: int

    @property
    def num_rows(self) -> int:
        """Examples times locations: the rows whose second moment a factor is."""
        return self.batch_size * IMAGE_SIZE**2

    def __str__(self) -> str:
        return f"{self.channels} channels, {self.kernel_size}×{self.kernel_size}, batch {self.batch_size}"


@dataclasses.dataclass(frozen=True)
class Case:
    """A layer under one structure.

    Args:
        layer: The convolution and its mini-batch.
        method: Which structure.
        group_size: Channels per group; ``None`` without groups.
        inverse_method: ``cholesky`` for dense inverses, the paper's count, or ``auto``.
    """

    layer: Layer
    method: PreconditionerName
    group_size: int | None
    inverse_method: InverseMethod

    @property
    def activation_blocks(self) -> tuple[int, int]:
        """Number and width of the activation factor's blocks."""
        count, size = self.gradient_blocks
        return count, size * (self.layer.kernel_size**2 if self.method in TAPS_IN_FEATURES else 1)

    @property
    def gradient_blocks(self) -> tuple[int, int]:
        """Number and width of the gradient factor's blocks."""
        size = min(self.group_size or self.layer.channels, self.layer.channels)
        return -(-self.layer.channels // size), size

    def dense_flops(self, cost: str) -> int:
        """Return the counted FLOPs with dense factors; a multiply-add counts as two.

        Args:
            cost: One of ``COSTS``. Inversion is Cholesky factorisation and inverse, d³ per block of width d.
        """
        layer, sides = self.layer, (self.activation_blocks, self.gradient_blocks)
        num_weights = layer.channels**2 * layer.kernel_size**2
        if cost == "forward_backward":
            return 3 * 2 * layer.num_rows * num_weights  # outputs, input gradients, weight gradients
        if cost == "statistics":
            return sum(2 * layer.num_rows * count * width**2 for count, width in sides)
        if cost == "inversion":
            return sum(count * width**3 for count, width in sides)
        return sum(2 * num_weights * width for _, width in sides)  # every weight meets a row of its block's inverse

    def needed_gib(self) -> float:
        """Return the GiB that a refresh with dense factors takes at its peak, in float32."""
        blocks = sum(count * width**2 for count, width in (self.activation_blocks, self.gradient_blocks))
        return _COPIES * _FLOAT_BYTES * blocks / 2**30


Axis = Literal["channels", "kernel_size", "batch_size", "group_size"]


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Sizes of one quantity, with all others fixed.

    Args:
        name: Its name on the command line.
        axis: What varies.
        values: Its sizes.
        base: The layer, but for what varies.
    """

    name: str
    axis: Axis
    values: tuple[int, ...]
    base: Layer

    def up_to(self, largest: int) -> "Sweep":
        """Return the sweep without sizes beyond ``largest``."""
        return dataclasses.replace(self, values=tuple(value for value in self.values if value <= largest))

    def cases(self) -> Iterator[Case]:
        """Yield all cases: every structure that has the quantity, by both ways of inverting."""
        for value in self.values:
            is_layer = self.axis != "group_size"
            layer = dataclasses.replace(self.base, **{self.axis: value}) if is_layer else self.base
            for method in METHODS if is_layer else GROUPED:
                size = (GROUP_SIZE if is_layer else value) if method in GROUPED else None
                for inverse_method in INVERSE_METHODS:
                    yield Case(layer, method, size, inverse_method)

    def size_of(self, case: Case) -> int | None:
        """Return the size of a case on the sweep, which may lie beyond its sizes; ``None`` if it is not on it."""
        if self.axis == "group_size":
            return case.group_size if case.layer == self.base else None
        size: int = getattr(case.layer, self.axis)
        is_on = dataclasses.replace(self.base, **{self.axis: size}) == case.layer
        return size if is_on and case.group_size in (None, GROUP_SIZE) else None


SWEEPS = (
    Sweep("width", "channels", tuple(64 * 2**power for power in range(8)), Layer(0, 3, 100)),
    Sweep("kernel", "kernel_size", (1, 3, 5, 7), Layer(128, 0, 100)),
    Sweep("group", "group_size", (8, 16, 32, 64, 128, 256), Layer(256, 3, 100)),
    Sweep("batch", "batch_size", (25, 50, 100, 200, 400), Layer(128, 3, 0)),
)


def by_layer(cases: Sequence[Case]) -> dict[Layer, list[Case]]:
    """Return the cases of every layer, each once, in the order in which they come first."""
    layers: dict[Layer, list[Case]] = {}
    for case in dict.fromkeys(cases):
        layers.setdefault(case.layer, []).append(case)
    return layers
