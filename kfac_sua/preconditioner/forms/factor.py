"""One side of a layer's Kronecker product: the protocol of factors that the forms implement.

A *factor* is normalised over examples: ``num_blocks`` symmetric positive semi-definite blocks of width d. It is stored
as one tensor: as moments, which add up (:class:`MomentFactor`), or, while these are few, as the rows U whose Gram
matrix UᵀU it is (:class:`LowRankFactor`).
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from kfac_sua.preconditioner.forms.inverse import ComputedInverse, Shape
from kfac_sua.preconditioner.geometry import LayerGeometry
from kfac_sua.preconditioner.precision import on_one_device


@dataclass(frozen=True)
class TraceSource:
    """Numbers from which the trace of a factor, or an upper bound close to it, is computed.

    Args:
        values: The numbers, a view of the tensor that the factor is stored as.
        order: 1 where the trace is their sum, as they are ≥ 0; 2 where it is the sum of their squares.
        multiple: What the sum is multiplied by.
    """

    values: Tensor
    order: int
    multiple: float = 1.0


def traces_of(factors: "Sequence[Factor]", multiples: Sequence[float]) -> Tensor:
    """Return the trace of each factor, or a close upper bound, times a number; ``[factors]``, in few launches."""
    sources = [factor.trace_source for factor in factors]
    found: dict[int, Tensor] = {}
    for order in (1, 2):
        members = [i for i, source in enumerate(sources) if source.order == order]
        if members:
            norms = torch._foreach_norm([sources[i].values for i in members], order)
            found |= dict(zip(members, norms if order == 1 else torch._foreach_mul(norms, norms), strict=True))
    numbers = [source.multiple * multiple for source, multiple in zip(sources, multiples, strict=True)]
    traces = torch._foreach_mul([found[i] for i in range(len(sources))], numbers)
    return torch.stack(on_one_device(traces))  # [factors]


class Factor(ABC):
    """One side of a layer's Kronecker product, in one of the forms.

    Attributes:
        number: Number of the form in messages between processes, > 0 and never used again; 0 for moments.
        names: Name of :attr:`values` in a checkpoint, by which it recognises the form.
        shapes: Its shape.
        never_negative: Its name, if it has no negative number.
        inverse_form: What :meth:`invert` returns.
        is_moment: Whether it is stored as moments, which add up; as rows otherwise.
    """

    number: ClassVar[int] = 0
    names: ClassVar[tuple[str, ...]]
    shapes: ClassVar[tuple[Shape, ...]]
    never_negative: ClassVar[tuple[str, ...]] = ()
    inverse_form: ClassVar[type[ComputedInverse]]
    is_moment: ClassVar[bool]

    @property
    @abstractmethod
    def values(self) -> Tensor:
        """The tensor that the factor is stored as."""

    @classmethod
    @abstractmethod
    def of(cls, values: Tensor, geometry: LayerGeometry) -> Self:
        """Return the factor that is stored as this tensor, for a layer of this geometry."""

    @abstractmethod
    def with_values(self, values: Tensor) -> Self:
        """Return the same form with other numbers, of perhaps fewer blocks."""

    def to_state(self) -> dict[str, Tensor]:
        """Return what a checkpoint stores, by :attr:`names`."""
        (name,) = self.names
        return {name: self.values}

    @property
    def num_blocks(self) -> int:
        """Number of blocks."""
        return len(self.values)

    @property
    @abstractmethod
    def width(self) -> int:
        """Width d of a block."""

    @property
    @abstractmethod
    def core_width(self) -> int:
        """Width of the matrices that :meth:`core` returns."""

    @abstractmethod
    def traces(self) -> Tensor:
        """Trace of every block, ``[num_blocks]``."""

    @property
    @abstractmethod
    def trace_source(self) -> TraceSource:
        """What :func:`traces_of` computes the trace of all blocks together from."""

    @abstractmethod
    def dense(self) -> Tensor:
        """Return the blocks, ``[num_blocks, d, d]``."""

    @abstractmethod
    def as_moment(self, form: type["MomentFactor"]) -> "MomentFactor":
        """Return the factor itself if it is stored as moments, else new moments of its blocks in this form."""

    @abstractmethod
    def matmul(self, values: Tensor) -> Tensor:
        """Multiply ``[num_blocks, d, n]`` by the blocks from the left, without forming blocks from rows."""

    @abstractmethod
    def core(self) -> Tensor:
        """Return a matrix per block with the block's non-zero eigenvalues, ``[num_blocks, core_width, core_width]``.

        Not to be changed if it is :attr:`values` itself.
        """

    @abstractmethod
    def loses_damping(self, dampings: Tensor) -> Tensor | None:
        """Whether the inverse would divide rounding errors by these dampings, ``[num_blocks]``; ``None``: never."""

    @classmethod
    @abstractmethod
    def invert(
        cls, factors: Sequence[Self], triangles: Sequence[Tensor], dampings: Sequence[Tensor]
    ) -> list[ComputedInverse]:
        """Return the inverses of factors in this form whose cores have the same width, dtype and device.

        Args:
            factors: The factors.
            triangles: For each, L of its damped cores L Lᵀ, ``[num_blocks, core_width, core_width]``.
            dampings: For each, the damping in them, ``[num_blocks]``.
        """

    def part(self, blocks: slice) -> Self:
        """Return some of the blocks, not copied."""
        return self.with_values(self.values[blocks])

    def in_float64(self, indices: Tensor) -> Self:
        """Return some of the blocks, in float64."""
        return self.with_values(self.values[indices].double())


class MomentFactor(Factor):
    """A factor stored as moments, which add up over rows, micro-batches, processes and time."""

    is_moment: ClassVar[bool] = True

    @classmethod
    @abstractmethod
    def is_chosen(cls, width: int) -> bool:
        """Whether moments of blocks of this width are stored in this form; the first form that agrees is taken."""

    @classmethod
    @abstractmethod
    def of_rows(cls, rows: Tensor) -> Self:
        """Return the moment of rows ``[num_blocks, rows, d]``."""

    @classmethod
    @abstractmethod
    def zeros(cls, num_blocks: int, width: int, like: Tensor) -> Self:
        """Return the moment of no rows, with the dtype and the device of ``like``."""

    @abstractmethod
    def pieces(self) -> Iterator[Tensor]:
        """Yield views of the numbers that processes send each other to add moments up."""

    @abstractmethod
    def from_numbers_(self, numbers: Tensor) -> Self:
        """Fill the factor from the numbers of all :meth:`pieces`, one after the other, and return it."""

    @classmethod
    @abstractmethod
    def count_numbers(cls, width: int) -> int:
        """Return how many numbers are in the :meth:`pieces` of a block of this width."""

    def as_moment(self, form: type["MomentFactor"]) -> "MomentFactor":
        """Return the factor itself."""
        del form
        return self


class LowRankFactor(Factor):
    """A factor stored as rows U, so that its rank is at most the number of rows: the block is UᵀU.

    Attributes:
        num_sizes: Number of dimensions of :attr:`values`, at most 4, the room in a description. The second to last
            dimension counts rows, or examples; along it the rows of several processes are concatenated.
    """

    num_sizes: ClassVar[int]
    is_moment: ClassVar[bool] = False

    @property
    @abstractmethod
    def num_rows(self) -> int:
        """Rows of a block."""

    @abstractmethod
    def formed_rows(self) -> Tensor:
        """Return U, ``[num_blocks, rows, d]``."""

    @classmethod
    @abstractmethod
    def num_rows_of(cls, sizes: Sequence[int], geometry: LayerGeometry) -> int:
        """Return the rows of a factor that is stored as a tensor of these sizes."""

    @classmethod
    @abstractmethod
    def concatenated(cls, parts: "Sequence[LowRankFactor]", multiple: float) -> Self | None:
        """Return the rows of all parts, multiplied by a number; ``None`` if this form cannot hold them."""

    @property
    def core_width(self) -> int:
        """Number of rows."""
        return self.num_rows

    def as_moment(self, form: type[MomentFactor]) -> MomentFactor:
        """Return UᵀU."""
        return form.of_rows(self.formed_rows())

    def matmul(self, values: Tensor) -> Tensor:
        """Multiply ``[num_blocks, d, n]`` by UᵀU from the left, without forming it."""
        rows = self.formed_rows()
        return torch.bmm(rows.mT, torch.bmm(rows, values))  # [num_blocks, d, n]

    def loses_damping(self, dampings: Tensor) -> Tensor:
        """Whether a damping is below the rounding of I − VᵀV, whose error the Woodbury identity divides by it."""
        return dampings < torch.finfo(dampings.dtype).eps * self.traces()
