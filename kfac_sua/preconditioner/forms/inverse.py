"""What a refresh computes from a damped factor: the protocol of inverses and eigenbases that the forms implement.

A refresh computes a :class:`RefreshResult` from each factor: an inverse, which multiplies vectors, or an eigenbasis.
The inverse is then kept in the form that is fastest to apply (see ``cost``): the one it was computed in, or another.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, Protocol, Self

from torch import Tensor

from kfac_sua.preconditioner.forms.patch_rows import PatchRows
from kfac_sua.preconditioner.forms.triangles import BlockMessage
from kfac_sua.preconditioner.geometry import ChannelGroups, LayerGeometry

Shape = tuple[int | str, ...]
"""Shape of a stored tensor: numbers, and letters for sizes that a layer or the tensor itself decides.

``b`` blocks of width ``d``, or ``d'`` with the padding of bfloat16 parts; any number of ``rows``; for pixels any height
``h``, width ``w`` and number of examples ``n``, and ``c`` input channels. ``checkpoint.layer_checks`` compares them.
"""


class FactorSizes(Protocol):
    """What an inverse needs to know about the factor that it is computed from (``factor.Factor``)."""

    @property
    def values(self) -> Tensor:
        """The tensor that the factor is stored as; its dtype and device are those of the inverse."""

    @property
    def num_blocks(self) -> int:
        """Number of blocks."""

    @property
    def width(self) -> int:
        """Width d of a block."""

    @property
    def core_width(self) -> int:
        """Width of the matrix that is factorised per block."""


class NamedTensors(ABC):
    """A few named tensors, which are kept from one refresh to the next.

    Attributes:
        names: Names of the tensors, by which a checkpoint recognises the form.
        shapes: Their shapes.
        never_negative: Names of those without a negative number.
    """

    names: ClassVar[tuple[str, ...]]
    shapes: ClassVar[tuple[Shape, ...]]
    never_negative: ClassVar[tuple[str, ...]] = ()

    def tensors(self) -> dict[str, Tensor]:
        """Return what a checkpoint stores, and an application reads, by :attr:`names`."""
        return {name: getattr(self, name) for name in self.names}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], geometry: LayerGeometry) -> Self:
        """Undo :meth:`tensors`, for a layer of this geometry. The tensors are not copied."""
        del geometry
        return cls(**tensors)  # forms are dataclasses of their tensors


def holds_rows(form: type[NamedTensors]) -> bool:
    """Whether the tensors of a form contain the rows of a mini-batch."""
    return any("rows" in shape for shape in form.shapes)


def holds_pixels(names: tuple[str, ...]) -> bool:
    """Whether a form with these tensors stores pixels, which only some layers can."""
    return "pixels" in names


class RefreshResult(NamedTensors):
    """The inverse of a damped factor, or its eigenbasis, as a refresh computes it, on one of the processes."""

    @classmethod
    @abstractmethod
    def flops_of(cls, factor: FactorSizes) -> int:
        """Return the FLOPs that it takes to compute this from one block of a factor."""

    @classmethod
    @abstractmethod
    def message_of(cls, factor: FactorSizes) -> BlockMessage:
        """Return what each block of the result is sent as; all processes know it before the result is computed."""

    @abstractmethod
    def to_message(self) -> tuple[Tensor, Tensor]:
        """Return matrices ``[num_blocks, height, width]`` and vectors ``[num_blocks, num_extra]``."""

    @classmethod
    @abstractmethod
    def from_message(cls, factor: FactorSizes, matrices: Tensor, extra: Tensor) -> Self:
        """Undo :meth:`to_message`, given the factor that the result was computed from.

        Args:
            factor: The factor.
            matrices: ``[num_blocks, height, width]``; in triangles, what ``triangle_pieces`` leaves out is not read.
            extra: ``[num_blocks, num_extra]``.
        """


class Inverse(NamedTensors):
    """The inverse of a damped factor, as it is applied.

    Attributes:
        form: Its name in a table.
    """

    form: ClassVar[str]

    @abstractmethod
    def left(self, values: Tensor) -> Tensor:
        """Multiply ``[num_blocks, d, n]`` from the left."""

    @abstractmethod
    def right(self, values: Tensor) -> Tensor:
        """Multiply ``[num_blocks, n, d]`` from the right."""

    def right_into(self, values: Tensor, out: Tensor) -> None:
        """Write what :meth:`right` returns into ``[num_blocks, n, d]``, which shares no memory with the values."""
        out.copy_(self.right(values))

    def right_of_patches(self, patches: PatchRows, groups: ChannelGroups) -> Tensor:
        """Multiply patches in channel groups from the right; ``[num_blocks, rows, d]``."""
        return self.right(patches.blocks(groups))


class ComputedInverse(Inverse, RefreshResult):
    """The inverse of a damped factor in the form that a refresh computes it in."""

    @property
    @abstractmethod
    def num_rows(self) -> int:
        """Rows that it was computed from by the Woodbury identity; 0 if it was computed from moments."""

    @property
    @abstractmethod
    def linear_tensor(self) -> Tensor:
        """The tensor in which the inverse is linear: multiplying this tensor multiplies the inverse."""

    @abstractmethod
    def dense(self) -> Tensor:
        """Return the blocks, ``[num_blocks, d, d]``; not to be changed."""

    @abstractmethod
    def split(self) -> Inverse:
        """Return the inverse in bfloat16 parts, which tensor cores multiply (see ``split``)."""
