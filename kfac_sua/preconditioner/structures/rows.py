"""The rows of a mini-batch as structures receive them: a layer's inputs and output gradients, per example."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kfac_sua.preconditioner.forms.unfold import pad, patches
from kfac_sua.preconditioner.geometry import LayerGeometry

CHUNK_ELEMENTS = 2**25
"""Numbers in the per-example gradients formed at once: 128 MiB in float32, so that those of a large batch do not fill
the device."""


@dataclass(frozen=True)
class LayerRows:
    """Inputs h and output gradients δ of the un-averaged loss, of every example n and output location s.

    The gradient of the loss of one example is ``Σ_s δ_{n,s} h_{n,s}ᵀ``, ``[g, p, d]``: the layer's weight
    gradient, taps before channels, with the bias as its last column. Examples with fewer locations than others are
    filled up with zeros.

    Args:
        inputs: Patches, ``[g, n, s, d]`` with g convolution groups and d = taps · channels, one more where there is a
            bias, whose coordinate is 1.
        output_grads: ``[g, c, n, s, p]``, with c backward passes: one, or one per class for the ``exact`` Fisher, which
            add up; c = 0 for a structure that says that it does not need them.
        num_rows: Locations of all examples together, without those filled up.
        kept: What the structure keeps of its last refresh, from which an iteration may start; ``None`` before the
            first. Not to be changed.
    """

    inputs: Tensor
    output_grads: Tensor
    num_rows: int
    kept: Mapping[str, Tensor] | None = None

    @property
    def num_examples(self) -> int:
        """N."""
        return self.inputs.shape[1]

    def activation_factor(self) -> Tensor:
        """Return Σ h hᵀ / N, summed over locations, ``[g, d, d]``.

        Reference: S · Ā of Grosse & Martens (2016), with S locations per example.
        """
        flat = self.inputs.flatten(1, 2)  # [g, n · s, d]
        return torch.bmm(flat.mT, flat) / self.num_examples  # [g, d, d]

    def gradient_factor(self) -> Tensor:
        """Return the mean of δ δᵀ over examples and locations, ``[g, p, p]``.

        Reference: Ḡ of Grosse & Martens (2016).
        """
        flat = self.output_grads.flatten(1, 3)  # [g, c · n · s, p]
        return torch.bmm(flat.mT, flat) / self.num_rows  # [g, p, p]

    def example_grads(self, output_basis: Tensor | None = None, input_basis: Tensor | None = None) -> Iterator[Tensor]:
        """Yield the gradients of single examples, in chunks.

        Args:
            output_basis: Columns U of a basis, ``[g, p, p]``: the gradients G become UᵀG; ``None`` for the usual one.
            input_basis: Columns V, ``[g, d, d]``: they become GV.

        Yields:
            ``[g, rows, p, d]``, a row per example and backward pass; the mean of their outer products over the N
            examples is the Fisher block.
        """
        groups, samples, _, _, p = self.output_grads.shape
        d = self.inputs.shape[-1]
        size = max(1, CHUNK_ELEMENTS // (groups * samples * p * d))
        for inputs, grads in zip(self.inputs.split(size, 1), self.output_grads.split(size, 2), strict=True):
            inputs = inputs if input_basis is None else inputs @ input_basis[:, None]  # [g, n, s, d]
            grads = grads if output_basis is None else grads @ output_basis[:, None, None]  # [g, c, n, s, p]
            yield (grads.mT @ inputs[:, None]).flatten(1, 2)  # from [g, c, n, p, d]


@dataclass
class ReadCall:
    """What is kept of one call: copies of its inputs and of its output gradients by backward pass.

    Args:
        inputs: ``[n, h, w, g · in_channels]``.
        output_grads: ``[n, h', w', g · out_channels]`` each.
    """

    inputs: Tensor
    output_grads: dict[int, Tensor]


def joined_rows(
    passes: Sequence[Sequence[ReadCall]],
    geometry: LayerGeometry,
    grad_scale: float,
    kept: Mapping[str, Tensor] | None,
) -> LayerRows:
    """Return the rows of all calls.

    Args:
        passes: Calls by the model's forward pass; the locations of calls of one pass belong to the same examples.
        geometry: The layer's geometry.
        grad_scale: Multiplies the output gradients.
        kept: What the structure keeps of its last refresh.
    """
    inputs, grads, num_rows = [], [], 0
    for calls in passes:
        by_call = [_patch_rows(call.inputs, geometry) for call in calls]  # [g, n, s, d] each
        grads_by_call = [
            _grad_rows(call.output_grads, geometry, rows) for call, rows in zip(calls, by_call, strict=True)
        ]
        inputs.append(torch.cat(by_call, dim=2))  # [g, n, s, d]
        grads.append(torch.cat(grads_by_call, dim=3))  # [g, c, n, s, p]
        num_rows += inputs[-1].shape[1] * inputs[-1].shape[2]
    most = max(one.shape[2] for one in inputs)
    filled_inputs = [F.pad(one, (0, 0, 0, most - one.shape[2])) for one in inputs]  # [g, n, most, d]
    filled_grads = [F.pad(one, (0, 0, 0, most - one.shape[3])) for one in grads]  # [g, c, n, most, p]
    return LayerRows(torch.cat(filled_inputs, dim=1), torch.cat(filled_grads, dim=2) * grad_scale, num_rows, kept)


def _patch_rows(inputs: Tensor, geometry: LayerGeometry) -> Tensor:
    """Return the patches of inputs ``[n, h, w, g · in_channels]``, ``[g, n, s, d]``."""
    windows = patches(pad(inputs, geometry), geometry)  # [n, h', w', kh, kw, g · in]
    windows = windows.flatten(3, 4).flatten(1, 2)  # [n, s, taps, g · in]
    split = windows.unflatten(-1, (geometry.conv_groups, geometry.in_channels))  # [n, s, taps, g, in]
    rows = split.permute(3, 0, 1, 2, 4).flatten(3)  # [g, n, s, taps · in]
    return F.pad(rows, (0, 1), value=1.0) if geometry.has_bias else rows  # [g, n, s, d]


def _grad_rows(output_grads: dict[int, Tensor], geometry: LayerGeometry, inputs: Tensor) -> Tensor:
    """Return output gradients ``[n, h', w', g · out_channels]`` by backward pass as ``[g, c, n, s, p]``.

    Args:
        output_grads: The gradients, none of them if they were not kept.
        geometry: The layer's geometry.
        inputs: Its inputs, ``[g, n, s, d]``.
    """
    if not output_grads:
        return inputs.new_empty(len(inputs), 0, *inputs.shape[1:3], geometry.out_channels)  # [g, 0, n, s, p]
    stacked = torch.stack([output_grads[sample] for sample in sorted(output_grads)])  # [c, n, h', w', g · out]
    split = stacked.flatten(2, 3).unflatten(-1, (geometry.conv_groups, geometry.out_channels))  # [c, n, s, g, out]
    return split.permute(3, 0, 1, 2, 4)  # [g, c, n, s, p]
