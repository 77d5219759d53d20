"""Symmetric blocks as about one triangle each, for what travels between processes."""

from collections.abc import Iterator

import torch
from torch import Tensor

PACKED_WIDTH = 64
"""Diagonal blocks up to this width are sent whole."""


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
    """Return how many numbers :func:`triangle_pieces` yields of one block."""
    if width <= PACKED_WIDTH:
        return width**2
    half = width // 2
    rest = width - half
    return triangle_numbers(half) + half * rest + triangle_numbers(rest)


def packed(*blocks: Tensor) -> Tensor:
    """Return the pieces of all ``[num_blocks, d, d]`` one after the other, ``[numbers]``."""
    return torch.cat([piece.flatten() for block in blocks for piece in triangle_pieces(block)])  # [numbers]


def unpack_(block: Tensor, flat: Tensor) -> Tensor:
    """Fill the upper triangles of ``[num_blocks, d, d]`` from what :func:`packed` gave of it; return it."""
    start = 0
    for piece in triangle_pieces(block):
        piece.copy_(flat[start : start + piece.numel()].view(piece.shape))  # [num_blocks, height, width]
        start += piece.numel()
    return block


def mirrored_(block: Tensor) -> Tensor:
    """Fill what :func:`triangle_pieces` leaves out from its mirror image."""
    width = block.shape[-1]
    if width > PACKED_WIDTH:
        half = width // 2
        mirrored_(block[:, :half, :half])
        mirrored_(block[:, half:, half:])
        block[:, half:, :half] = block[:, :half, half:].mT  # [num_blocks, d − half, half]
    return block
