"""What every form of a factor can do, and what a refresh makes of it: the protocol that the other files fill in.

A *factor* is one side of a layer's Kronecker product, normalised over examples: ``num_blocks`` symmetric positive
semi-definite blocks of width d. It is kept as one tensor: as moments that add up (:class:`SumFactor`), or, while these
are few, as the rows whose Gram matrix it is (:class:`RowFactor`). Of each factor a refresh makes an inverse, which
multiplies vectors, or an eigenbasis; what both have in common is :class:`Prepared`.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from kfac_sua.preconditioner.forms.patch_rows import PatchRows
from kfac_sua.preconditioner.forms.triangles import triangle_numbers
from kfac_sua.preconditioner.geometry import ChannelGroups, LayerGeometry
from kfac_sua.preconditioner.precision import on_one_device

Shape = tuple[int | str, ...]
"""Shape of a kept tensor: numbers, and letters for what a layer or the tensor itself decides (``layer_checks``).

``b`` blocks of width ``d``, which is ``d′`` with the padding of bfloat16 parts; any number of ``rows``; and of pixels
any height ``h``, width ``w`` and number of examples ``n``, and ``c`` input channels.
"""


@dataclass(frozen=True)
class BlockMessage:
    """What the inverse or the eigenbasis of a block is sent as to other processes: a matrix and a vector.

    Args:
        height: Rows of the matrix.
        width: Columns of the matrix.
        is_triangle: Whether its upper triangle (see ``triangles``) says all of it.
        num_extra: Numbers in the vector.
    """

    height: int
    width: int
    is_triangle: bool
    num_extra: int

    @property
    def num_matrix(self) -> int:
        """Numbers that the matrix is sent as."""
        return triangle_numbers(self.width) if self.is_triangle else self.height * self.width

    @property
    def numbers(self) -> int:
        """Numbers that are sent of a block."""
        return self.num_matrix + self.num_extra


@dataclass(frozen=True)
class TraceSource:
    """Numbers whose sum, or the sum of whose squares, times a number is the trace of a factor, or a little more.

    Args:
        values: The numbers, a view of what the factor keeps.
        order: 1 for their sum, as they are ≥ 0; 2 for the sum of their squares.
        times: The number.
    """

    values: Tensor
    order: int
    times: float = 1.0


def traces_of(factors: "Sequence[Factor]", times: Sequence[float]) -> Tensor:
    """Return the trace of each factor times a number, or a little more, ``[factors]``; few launches for all."""
    sources = [factor.trace_source for factor in factors]
    found: dict[int, Tensor] = {}
    for order in (1, 2):
        members = [i for i, source in enumerate(sources) if source.order == order]
        if members:
            norms = torch._foreach_norm([sources[i].values for i in members], order)
            found |= dict(zip(members, norms if order == 1 else torch._foreach_mul(norms, norms), strict=True))
    numbers = [source.times * number for source, number in zip(sources, times, strict=True)]
    return torch.stack(on_one_device(torch._foreach_mul([found[i] for i in range(len(sources))], numbers)))


class Kept(ABC):
    """What is kept from a refresh to the next, as a few named tensors.

    Attributes:
        names: Names of the tensors, by which a checkpoint knows the form.
        shapes: Their shapes.
        never_negative: Names of those without a negative number.
    """

    names: ClassVar[tuple[str, ...]]
    shapes: ClassVar[tuple[Shape, ...]]
    never_negative: ClassVar[tuple[str, ...]] = ()

    def tensors(self) -> dict[str, Tensor]:
        """Return what a checkpoint keeps, and an application reads, by :attr:`names`."""
        return {name: getattr(self, name) for name in self.names}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], geometry: LayerGeometry) -> Self:
        """Undo :meth:`tensors`, for a layer of this geometry. The tensors are not copied."""
        del geometry
        return cls(**tensors)  # forms are dataclasses of their tensors


def is_made_of_rows(form: type[Kept]) -> bool:
    """Whether what is kept in a form has the rows of a mini-batch in it."""
    return any("rows" in shape for shape in form.shapes)


def is_made_of_pixels(names: tuple[str, ...]) -> bool:
    """Whether a form with these names keeps pixels, as only some layers can."""
    return "pixels" in names


class Prepared(Kept):
    """The inverse of a damped factor, or its eigenbasis, as a refresh makes it, on whichever process."""

    @classmethod
    @abstractmethod
    def flops_of(cls, factor: "Factor") -> int:
        """Return the FLOPs that it takes to make of one block of a factor."""

    @classmethod
    @abstractmethod
    def message_of(cls, factor: "Factor") -> BlockMessage:
        """Return what each block of a factor is sent as once it is made, which all processes know beforehand."""

    @abstractmethod
    def to_message(self) -> tuple[Tensor, Tensor]:
        """Return matrices ``[num_blocks, height, width]`` and vectors ``[num_blocks, num_extra]``."""

    @classmethod
    @abstractmethod
    def from_message(cls, factor: "Factor", matrices: Tensor, extra: Tensor) -> Self:
        """Undo :meth:`to_message`, given the factor that it was made of.

        Args:
            factor: The factor.
            matrices: ``[num_blocks, height, width]``; of triangles, what ``triangle_pieces`` leaves out is not read.
            extra: ``[num_blocks, num_extra]``.
        """


class Inverse(Kept):
    """The inverse of a damped factor, as it is applied.

    Attributes:
        form: What it is called in a table.
    """

    form: ClassVar[str]

    @abstractmethod
    def left(self, values: Tensor) -> Tensor:
        """Multiply ``[num_blocks, d, n]`` from the left."""

    @abstractmethod
    def right(self, values: Tensor) -> Tensor:
        """Multiply ``[num_blocks, n, d]`` from the right."""

    def right_into(self, values: Tensor, out: Tensor) -> None:
        """Write what :meth:`right` gives into ``[num_blocks, n, d]``, which shares no memory with the values."""
        out.copy_(self.right(values))

    def right_of_patches(self, patches: PatchRows, groups: ChannelGroups) -> Tensor:
        """Multiply patches in channel groups from the right; ``[num_blocks, rows, d]``."""
        return self.right(patches.blocks(groups))


class MadeInverse(Inverse, Prepared):
    """The inverse of a damped factor as a refresh makes it, which may be kept in another form (see ``cost``)."""

    @property
    @abstractmethod
    def num_rows(self) -> int:
        """Rows that it was made of by the Woodbury identity; 0 if it was made of moments."""

    @property
    @abstractmethod
    def scaled(self) -> Tensor:
        """The tensor that a multiple of the inverse has multiplied."""

    @abstractmethod
    def dense(self) -> Tensor:
        """Return the blocks, ``[num_blocks, d, d]``; not to be changed."""

    @abstractmethod
    def split(self) -> Inverse:
        """Return the inverse in parts that tensor cores multiply (see ``split``)."""


class Factor(ABC):
    """One side of a layer's Kronecker product, in one of the forms.

    Attributes:
        number: Number of the form in messages between processes, > 0 and never used again; 0 for moments.
        names: Name of :attr:`values` in a checkpoint, by which it knows the form.
        shapes: Its shape.
        never_negative: Its name, if it has no negative number.
        inverse_form: What :meth:`invert` gives.
        is_summed: Whether it is kept as moments that add up, or as rows.
    """

    number: ClassVar[int] = 0
    names: ClassVar[tuple[str, ...]]
    shapes: ClassVar[tuple[Shape, ...]]
    never_negative: ClassVar[tuple[str, ...]] = ()
    inverse_form: ClassVar[type[MadeInverse]]
    is_summed: ClassVar[bool]

    @property
    @abstractmethod
    def values(self) -> Tensor:
        """The tensor that it is kept as."""

    @classmethod
    @abstractmethod
    def of(cls, values: Tensor, geometry: LayerGeometry) -> Self:
        """Return the factor that is kept as this tensor, of a layer of this geometry."""

    @abstractmethod
    def with_values(self, values: Tensor) -> Self:
        """Return the same form with other numbers, of perhaps fewer blocks."""

    def to_state(self) -> dict[str, Tensor]:
        """Return what a checkpoint keeps, by :attr:`names`."""
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
        """Width of the matrices that :meth:`core` gives."""

    @abstractmethod
    def traces(self) -> Tensor:
        """Trace of every block, ``[num_blocks]``."""

    @property
    @abstractmethod
    def trace_source(self) -> TraceSource:
        """What the traces of all blocks together are had from, for many factors at once."""

    @abstractmethod
    def dense(self) -> Tensor:
        """Return the blocks, ``[num_blocks, d, d]``."""

    @abstractmethod
    def summed(self, form: type["SumFactor"]) -> "SumFactor":
        """Return the moments of the blocks: the factor itself if it is kept as moments, else new ones in this form."""

    @abstractmethod
    def times(self, values: Tensor) -> Tensor:
        """Multiply ``[num_blocks, d, n]`` by the blocks, without forming them from rows."""

    @abstractmethod
    def core(self) -> Tensor:
        """Return a matrix per block that has its non-zero eigenvalues, ``[num_blocks, core_width, core_width]``.

        Not to be changed if it is :attr:`values` itself.
        """

    @abstractmethod
    def loses_damping(self, dampings: Tensor) -> Tensor | None:
        """Whether the inverse would divide rounding errors by these dampings, ``[num_blocks]``; ``None``: never."""

    @classmethod
    @abstractmethod
    def invert(
        cls, factors: Sequence[Self], triangles: Sequence[Tensor], dampings: Sequence[Tensor]
    ) -> list[MadeInverse]:
        """Return the inverses of factors in this form whose cores have one width, dtype and device.

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


class SumFactor(Factor):
    """A factor kept as moments, which add up over rows, micro-batches, processes and time."""

    is_summed: ClassVar[bool] = True

    @classmethod
    @abstractmethod
    def is_chosen(cls, width: int) -> bool:
        """Whether moments of blocks of this width are kept in this form; the first form that says so is taken."""

    @classmethod
    @abstractmethod
    def of_rows(cls, rows: Tensor) -> Self:
        """Return the moment of rows ``[num_blocks, rows, d]``."""

    @classmethod
    @abstractmethod
    def zeros(cls, num_blocks: int, width: int, like: Tensor) -> Self:
        """Return the moment of no rows."""

    @abstractmethod
    def pieces(self) -> Iterator[Tensor]:
        """Yield views of what travels where processes add moments up."""

    @abstractmethod
    def from_numbers_(self, numbers: Tensor) -> Self:
        """Fill the factor from the numbers of all :meth:`pieces`, one after the other, and return it."""

    @classmethod
    @abstractmethod
    def count_numbers(cls, width: int) -> int:
        """Return how many numbers are in the :meth:`pieces` of a block of this width."""

    def summed(self, form: type["SumFactor"]) -> "SumFactor":
        """Return the factor itself."""
        del form
        return self


class RowFactor(Factor):
    """A factor kept as rows U, of rank ≤ rows: the block is UᵀU.

    Attributes:
        num_sizes: Number of dimensions of :attr:`values`, at most 4, as many as a description has room for. The last
            but one counts rows, or examples: along it the rows of several processes are joined.
    """

    num_sizes: ClassVar[int]
    is_summed: ClassVar[bool] = False

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
        """Return the rows of a factor that is kept as a tensor of these sizes."""

    @classmethod
    @abstractmethod
    def joined(cls, parts: "Sequence[RowFactor]", factor: float) -> Self | None:
        """Return the rows of all parts, each times a number; ``None`` if this form cannot hold them."""

    @property
    def core_width(self) -> int:
        """Number of rows."""
        return self.num_rows

    def summed(self, form: type[SumFactor]) -> SumFactor:
        """Return UᵀU."""
        return form.of_rows(self.formed_rows())

    def times(self, values: Tensor) -> Tensor:
        """Multiply ``[num_blocks, d, n]`` by UᵀU, without forming it."""
        rows = self.formed_rows()
        return torch.bmm(rows.mT, torch.bmm(rows, values))  # [num_blocks, d, n]

    def loses_damping(self, dampings: Tensor) -> Tensor:
        """Whether a damping is below the rounding of I − VᵀV, whose error the Woodbury form divides by it."""
        return dampings < torch.finfo(dampings.dtype).eps * self.traces()
