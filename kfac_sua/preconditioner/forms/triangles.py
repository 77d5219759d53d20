"""What processes send each other: a matrix and a vector per block, of a symmetric matrix about one triangle."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

PACKED_WIDTH = 64
"""Diagonal blocks up to this width are sent whole: halving them again would double the number of copies, and save 6 %
of the numbers of a block of width 512."""


@dataclass(frozen=True)
class BlockMessage:
    """What the inverse or the eigenbasis of a block is sent as to other processes: a matrix and a vector.

    Args:
        height: Height of the matrix.
        width: Width of the matrix.
        is_triangle: Whether its upper triangle determines it, and is all that is sent.
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


def triangle_pieces(block: Tensor) -> Iterator[Tensor]:
    """Yield views that cover the upper triangles of ``[num_blocks, d, d]``, and little more."""
    width = block.shape[-1]
    if width <= PACKED_WIDTH:
        yield block
        return
    half = width // 2
    yield from triangle_pieces(block[:, :half, :half])
    yield block[:, :half, half:]
    yield from triangle_pieces(block[:, half:, half:])


def triangle_numbers(width: int) -> int:
    """Return how many numbers of one block :func:`triangle_pieces` yields."""
    if width <= PACKED_WIDTH:
        return width**2
    half = width // 2
    rest = width - half
    return triangle_numbers(half) + half * rest + triangle_numbers(rest)


def packed(*blocks: Tensor) -> Tensor:
    """Return the pieces of all ``[num_blocks, d, d]`` one after the other, ``[numbers]``."""
    return torch.cat([piece.flatten() for block in blocks for piece in triangle_pieces(block)])  # [numbers]


def unpack_(block: Tensor, flat: Tensor) -> Tensor:
    """Fill the upper triangles of ``[num_blocks, d, d]`` from what :func:`packed` returned; return the blocks."""
    start = 0
    for piece in triangle_pieces(block):
        piece.copy_(flat[start : start + piece.numel()].view(piece.shape))  # [num_blocks, height, width]
        start += piece.numel()
    return block


def mirrored_(block: Tensor) -> Tensor:
    """Fill what :func:`triangle_pieces` leaves out of ``[num_blocks, d, d]`` by symmetry; return the blocks."""
    width = block.shape[-1]
    if width > PACKED_WIDTH:
        half = width // 2
        mirrored_(block[:, :half, :half])
        mirrored_(block[:, half:, half:])
        block[:, half:, :half] = block[:, :half, half:].mT  # [num_blocks, d − half, half]
    return block
