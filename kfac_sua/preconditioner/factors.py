"""Second moments of layer inputs and output gradients, as rows and as blocks.

Conventions, once: h are inputs, δ gradients of the *un-averaged* per-example loss at the outputs, N examples, S output
locations, T taps. The Kronecker product approximates the mean per-example Fisher block of the weight gradient in the
order ``[out, taps, in]`` (PyTorch's ``channels_last`` order of a weight), where K-FAC is
``kron(gradient_factor, activation_factor)`` and SUA ``kron(gradient_factor, I_T, channel_factor)``.

- ``expand``: S · Ā ⊗ Ḡ, with Ā = mean over n, s of h hᵀ and Ḡ = mean over n, s of δ δᵀ (Grosse & Martens 2016).
- ``reduce``: E[h̄ h̄ᵀ] ⊗ E[δ̄ δ̄ᵀ], with h̄ the mean and δ̄ the sum over locations (Laurent et al. 2018, eq. 1).

Every function returns rows ``[blocks, rows, d]`` whose Gram matrix over rows is the un-normalised block.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kfac_sua.preconditioner.grouping import BiasBlock, BlockLayout
from kfac_sua.preconditioner.layers import LayerGeometry
from kfac_sua.preconditioner.patch_rows import PatchRows
from kfac_sua.preconditioner.pixels import cached_read_counts, output_size, pad, patches, split_channels

MAX_PATCH_ELEMENTS = 2**25
"""Numbers in the patches formed at once (128 MiB in float32); larger batches are taken in chunks of examples."""

SYMMETRIC_WIDTH = 256
"""Width from which a quarter of a Gram matrix is worth leaving out (measured on a CPU: 24 to 30 % faster)."""


@dataclass
class Factor:
    """One side of a layer's Kronecker product, normalised: dense blocks, or rows whose Gram matrix they are.

    Exactly one of the three is given.

    Args:
        blocks: Symmetric positive semi-definite, ``[num_blocks, d, d]``.
        rows: ``[num_blocks, rows, d]`` with ``blocks = rowsᵀ rows``.
        patches: Such rows of one block, as the patches of a mini-batch.
    """

    blocks: Tensor | None = None
    rows: Tensor | None = None
    patches: PatchRows | None = None

    @property
    def values(self) -> Tensor:
        """The tensor that the factor is kept as."""
        if self.patches is not None:
            return self.patches.pixels
        values = self.blocks if self.blocks is not None else self.rows
        assert values is not None
        return values

    @property
    def num_blocks(self) -> int:
        """Number of blocks."""
        return 1 if self.patches is not None else len(self.values)

    @property
    def width(self) -> int:
        """Width d of a block."""
        if self.patches is not None:
            return self.patches.geometry.in_channels * self.patches.geometry.num_taps
        return self.values.shape[-1]

    def traces(self) -> Tensor:
        """Trace of every block, ``[num_blocks]``."""
        if self.patches is not None:
            return self.patches.trace()[None]
        if self.blocks is not None:
            return self.blocks.diagonal(dim1=-2, dim2=-1).sum(-1)
        return self.values.square().sum((-2, -1))

    def dense(self) -> Tensor:
        """Return the blocks, ``[num_blocks, d, d]``."""
        if self.blocks is not None:
            return self.blocks
        return gram(self.patches.rows()[None] if self.patches is not None else self.values)

    def times(self, values: Tensor) -> Tensor:
        """Multiply ``[num_blocks, d, n]`` by the blocks, without forming them from rows."""
        if self.blocks is not None:
            return torch.bmm(self.blocks, values)
        rows = self.patches.rows()[None] if self.patches is not None else self.values
        return torch.bmm(rows.mT, torch.bmm(rows, values))

    @property
    def core_width(self) -> int:
        """Width of the matrices that :meth:`core` gives."""
        if self.patches is not None:
            return self.patches.num_rows
        return self.values.shape[-1 if self.blocks is not None else -2]

    def core(self) -> Tensor:
        """Return a new matrix per block that has the block's non-zero eigenvalues: the block, or its rows' products."""
        if self.blocks is not None:
            return self.blocks.clone()
        return self.patches.gram()[None] if self.patches is not None else self.values @ self.values.mT

    def part(self, blocks: slice) -> "Factor":
        """Return some of the blocks, not copied."""
        if self.patches is not None:
            return self
        return Factor(blocks=self.values[blocks]) if self.blocks is not None else Factor(rows=self.values[blocks])

    def in_float64(self, indices: Tensor) -> "Factor":
        """Return some of the blocks, in float64."""
        if self.patches is not None:
            return Factor(patches=self.patches.double())
        values = self.values[indices].double()
        return Factor(blocks=values) if self.blocks is not None else Factor(rows=values)


def gram(rows: Tensor) -> Tensor:
    """Return rowsᵀ rows of ``[blocks, rows, d]``, as ``[blocks, d, d]``; of wide blocks, one triangle is computed."""
    width = rows.shape[-1]
    if width < SYMMETRIC_WIDTH:
        return rows.mT @ rows
    left, right = rows.split([width // 2, width - width // 2], dim=-1)
    product = left.mT @ right
    return torch.cat([torch.cat([gram(left), product], dim=-1), torch.cat([product.mT, gram(right)], dim=-1)], dim=-2)


def gradient_rows(output_grads: Tensor, layout: BlockLayout, *, reduce: bool) -> Tensor:
    """Return the rows of the gradient factor.

    Args:
        output_grads: ``[n, h', w', conv_groups · out_channels]``.
        layout: The layer's block layout.
        reduce: Sum over locations first.

    Returns:
        ``[conv_groups · P, n · h' · w', p]``, or ``[conv_groups · P, n, p]`` under ``reduce``.
    """
    grads = output_grads.flatten(1, 2)  # [n, locations, channels]
    grads = grads.sum(1) if reduce else grads.flatten(0, 1)  # [rows, channels]
    return split_channels(grads.unsqueeze(1), layout.conv_groups, layout.gradient)


def num_activation_rows(inputs: Tensor, geometry: LayerGeometry, layout: BlockLayout) -> int:
    """Return how many rows :func:`activation_rows` gives for inputs ``[n, h, w, channels]``."""
    num_examples, height, width, _ = inputs.shape
    if layout.taps_in_features:
        height, width = output_size(geometry, height, width)
    elif geometry.padding_mode != "zeros":
        left, right, top, bottom = geometry.padding
        height, width = height + top + bottom, width + left + right
    return num_examples * height * width


def activation_rows(inputs: Tensor, geometry: LayerGeometry, layout: BlockLayout) -> Iterator[Tensor]:
    """Yield the rows of the activation factor under ``expand``, in chunks of examples.

    For K-FAC a row is the patch read at one output location. For SUA it is one input pixel x_p times √w_p, where w_p
    counts the (location, tap) pairs that read the pixel, so that the Gram matrix Σ_p w_p x_p x_pᵀ is the sum of the T
    diagonal tap blocks of K-FAC's: right for every stride, padding and dilation, without forming patches.

    Args:
        inputs: ``[n, h, w, conv_groups · in_channels]``.
        geometry: The layer's geometry.
        layout: The layer's block layout.

    Yields:
        ``[conv_groups · Q, rows, d]``.
    """
    if not layout.taps_in_features:
        yield _weighted_pixels(inputs, geometry, layout)
        return
    windows = patches(pad(inputs, geometry), geometry)  # [n, h', w', kh, kw, channels], a view
    per_example = windows[:1].numel()
    for chunk in windows.split(max(1, MAX_PATCH_ELEMENTS // max(1, per_example))):
        yield _patch_rows(chunk.flatten(0, 2), layout)


def sampled_activation_rows(
    inputs: Tensor, geometry: LayerGeometry, layout: BlockLayout, most: int
) -> Iterator[Tensor]:
    """Yield at most ``most`` of the rows of :func:`activation_rows`, scaled so that the expected moment is the same.

    An approximation: the rows are spread evenly over examples and locations, one from each of ``most`` equal stretches
    at an offset of the golden ratio's multiples, so that no regular pattern of locations is favoured.

    Args:
        inputs: ``[n, h, w, conv_groups · in_channels]``.
        geometry: The layer's geometry.
        layout: The layer's block layout.
        most: Rows to take.

    Yields:
        ``[conv_groups · Q, rows, d]``.
    """
    if not layout.taps_in_features:
        rows = _weighted_pixels(inputs, geometry, layout)
        chosen = _spread(rows.shape[1], most, inputs.device)
        yield rows[:, chosen] * (rows.shape[1] / len(chosen)) ** 0.5
        return
    windows = patches(pad(inputs, geometry), geometry)
    height, width = windows.shape[1:3]
    total = windows.shape[:3].numel()
    chosen = _spread(total, most, inputs.device)
    example, row, column = chosen // (height * width), chosen // width % height, chosen % width
    yield _patch_rows(windows[example, row, column], layout) * (total / len(chosen)) ** 0.5


def reduced_activation_rows(inputs: Tensor, geometry: LayerGeometry, layout: BlockLayout) -> Tensor:
    """Return the rows of the activation factor under ``reduce``: patches summed over locations.

    Returns:
        K-FAC: ``[conv_groups · Q, n, d]``. SUA: ``[conv_groups · Q, n · taps, d]``, a row per example and tap.
    """
    windows = patches(pad(inputs, geometry), geometry)  # [n, h', w', kh, kw, channels]
    num_locations = windows.shape[1] * windows.shape[2]
    summed = windows.sum((1, 2)).flatten(1, 2)  # [n, taps, channels]
    if not layout.taps_in_features:
        summed = summed.flatten(0, 1).unsqueeze(1)  # [n · taps, 1, channels]
    rows = split_channels(summed, layout.conv_groups, layout.activation)
    return _with_bias_coordinate(rows, layout, float(num_locations))


def _patch_rows(windows: Tensor, layout: BlockLayout) -> Tensor:
    """Return patches ``[rows, kh, kw, channels]`` as ``[conv_groups · Q, rows, d]``."""
    rows = split_channels(windows.flatten(1, 2), layout.conv_groups, layout.activation)
    return _with_bias_coordinate(rows, layout, 1.0)


def _spread(total: int, most: int, device: torch.device) -> Tensor:
    """Return at most ``most`` of the numbers below ``total``, increasing, one from each of as many equal stretches."""
    if total <= most:
        return torch.arange(total, device=device)
    stretch = torch.arange(most, device=device)
    start, stop = stretch * total // most, (stretch + 1) * total // most
    offset = torch.frac(stretch.double() * ((5**0.5 - 1) / 2))
    return start + (offset * (stop - start)).long()


def _weighted_pixels(inputs: Tensor, geometry: LayerGeometry, layout: BlockLayout) -> Tensor:
    if geometry.padding_mode != "zeros":
        inputs = pad(inputs, geometry)
    counts = cached_read_counts(geometry, inputs.shape[1], inputs.shape[2], inputs.device, inputs.dtype)  # [h, w]
    pixels = (inputs * counts.sqrt().unsqueeze(-1)).flatten(0, 2)  # [rows, channels]
    return split_channels(pixels.unsqueeze(1), layout.conv_groups, layout.activation)


def _with_bias_coordinate(rows: Tensor, layout: BlockLayout, value: float) -> Tensor:
    if layout.bias is not BiasBlock.JOINT:
        return rows
    return F.pad(rows, (0, 1), value=value)
