"""Does what was recorded of a layer add up to its weight gradient?

The weight gradient of recorded calls is Σ δ hᵀ. Some of its entries, each a sum of products δᵢ hⱼ, are compared with
the same entries of the gradient that autograd hands to ``.grad``: before hooks on it, clipping, unscaling, weight decay
and the average over processes, none of which can make them differ. They do where the weight is also used without a call
that is recorded. A part along the weight itself, the gradient of a penalty on its squares, is left out.

On a GPU launches are what a refresh has to save: four per layer, and some for all layers together.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kfac_sua.preconditioner.forms.unfold import output_size, pad, to_locations
from kfac_sua.preconditioner.geometry import LayerGeometry
from kfac_sua.preconditioner.precision import at_least_float32

MOST_CHANNELS = 4
"""Channels whose entries are compared on either side: 16 entries, of which the part along the weight takes up one. More
read more of inputs and gradients."""

TOLERANCE = 0.05
"""Difference, relative to the entries, beyond which they do not agree. The foreign passes seen make 0.16 and more."""

ROUNDING = 0.01
"""The same, relative to the root of their terms' squares, below which sums that cancel lie. Rounding each term to
bfloat16, of a relative precision of 0.004, makes half of it."""


@dataclass(frozen=True)
class Terms:
    """Products δᵢ hⱼ of one call, for some i and j: how many, and their mean and variance, ``[outs, ins]`` each."""

    count: int
    means: Tensor
    variances: Tensor


class GradientCheck:
    """Compares the entries of one layer: of a few channels, one tap of the kernel, the first group of a convolution.

    Args:
        geometry: The layer's geometry.
    """

    def __init__(self, geometry: LayerGeometry) -> None:
        self._geometry = geometry
        self._ins = _spread(geometry.in_channels)
        self._outs = _spread(geometry.out_channels)
        self._tap = _central_tap(geometry)
        self._expected: dict[int, list[Terms]] = {}
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self._expected.clear()
        self.terms: list[Terms] = []
        self.got: Tensor | None = None

    def of_inputs(self, inputs: Tensor) -> Tensor:
        """Return hⱼ at every output location of one call, for some j.

        Args:
            inputs: Its inputs, ``[n, h, w, channels]``.

        Returns:
            ``[n, h', w', channels]`` of a few channels, a copy.
        """
        geometry = self._geometry
        height, width = output_size(geometry, inputs.shape[1], inputs.shape[2])
        starts, sizes = [], (height, width)
        for axis, tap in enumerate(self._tap):
            start = geometry.dilation[axis] * tap - geometry.padding[2 - 2 * axis]
            end = start + geometry.stride[axis] * (sizes[axis] - 1)
            starts.append(start)
            if start < 0 or end >= inputs.shape[1 + axis]:
                break
        else:
            return self._read(inputs[..., self._ins], starts, sizes)
        starts = [d * tap for d, tap in zip(geometry.dilation, self._tap, strict=True)]
        return self._read(pad(inputs[..., self._ins], geometry), starts, sizes)

    def expect(self, task: int, of_inputs: Tensor, output_grads: Tensor) -> None:
        """Take in the output gradients of a call.

        Args:
            task: The backward pass that brings them.
            of_inputs: What :meth:`of_inputs` returned for the call.
            output_grads: Gradient with respect to its output.
        """
        grads = at_least_float32(to_locations(output_grads.detach(), self._geometry)[..., self._outs])
        terms = grads[..., :, None] * of_inputs[..., None, :]  # [n, h', w', outs, ins]
        variances, means = torch.var_mean(terms, (0, 1, 2), correction=0)  # [outs, ins] each
        self._expected.setdefault(task, []).append(Terms(terms.shape[:3].numel(), means, variances))

    def compare(self, task: int, grad: Tensor) -> None:
        """Take in the gradient that a backward pass hands to ``.grad``.

        Args:
            task: The backward pass.
            grad: In the shape of the weight.
        """
        self.terms += self._expected.pop(task, [])
        if self.terms:
            got = at_least_float32(self.entries(grad.detach())).clone()
            self.got = got if self.got is None else self.got + got

    def entries(self, values: Tensor) -> Tensor:
        """Return the entries that are compared, ``[outs, ins]``, a view of a tensor in the shape of the weight."""
        own = values[: self._geometry.out_channels][self._outs, self._ins]
        return own[..., *self._tap] if self._geometry.is_convolution else own

    def _read(self, values: Tensor, starts: Sequence[int], sizes: Sequence[int]) -> Tensor:
        """Return ``[n, h, w, ins]`` from a pixel on, in steps of the stride."""
        rows, columns = (
            slice(start, start + stride * (size - 1) + 1, stride)
            for start, stride, size in zip(starts, self._geometry.stride, sizes, strict=True)
        )
        return at_least_float32(values[:, rows, columns]).clone()  # [n, h', w', ins]


@torch.no_grad()
def do_not_add_up(checks: Sequence[GradientCheck], weights: Sequence[Tensor]) -> Tensor:
    """Return of each layer whether gradient and records differ, ``[layers]``, bool, on the device.

    Layers of which nothing was compared do not, nor those whose entries are not finite.

    Args:
        checks: One per layer.
        weights: The layers' weights.
    """
    compared = [i for i, check in enumerate(checks) if check.got is not None]
    device = weights[0].device
    if not compared:
        return torch.zeros(len(checks), dtype=torch.bool, device=device)
    terms = [one for i in compared for one in checks[i].terms]
    counts, means = [one.count for one in terms], [one.means for one in terms]
    second = torch._foreach_add(torch._foreach_mul(means, means), [one.variances for one in terms])
    sums, squares = (iter(torch._foreach_mul(some, counts)) for some in (means, second))
    got, expected, square_sums, along = (
        _stacked(column, device)  # [layers, 4, 4]
        for column in (
            [checks[i].got for i in compared],
            [_sum_of_next(sums, len(checks[i].terms)) for i in compared],
            [_sum_of_next(squares, len(checks[i].terms)) for i in compared],
            [checks[i].entries(weights[i].detach()) for i in compared],
        )
    )
    along = along.to(got.dtype)
    difference = got - expected
    products = torch.stack([difference * difference, difference * along, along * along, got * got, square_sums])
    of_difference, crossed, of_weight, of_got, of_terms = products.sum((2, 3))  # [layers] each
    rest = (of_difference - crossed**2 / of_weight.clamp(min=torch.finfo(got.dtype).tiny)).clamp(min=0).sqrt()
    fail = rest > TOLERANCE * of_got.sqrt() + ROUNDING * of_terms.sqrt()
    if len(compared) == len(checks):
        return fail
    flags = torch.zeros(len(checks), dtype=torch.bool, device=device)
    return flags.index_copy(0, torch.tensor(compared).to(device), fail)


def _sum_of_next(tensors: Iterator[Tensor], count: int) -> Tensor:
    """Return the sum of the next few tensors: of the calls of a layer, mostly one."""
    total = next(tensors)
    for _ in range(count - 1):
        total = total + next(tensors)
    return total


def _stacked(matrices: Sequence[Tensor | None], device: torch.device) -> Tensor:
    """Return matrices together, filled up with zeros where a layer has fewer channels."""
    filled = []
    for matrix in matrices:
        assert matrix is not None
        height, width = matrix.shape
        is_full = height == width == MOST_CHANNELS
        matrix = matrix if is_full else F.pad(matrix, (0, MOST_CHANNELS - width, 0, MOST_CHANNELS - height))
        filled.append(matrix.to(device))
    return torch.stack(filled)


def _spread(num_channels: int) -> slice:
    """Return a few channels, spread over all."""
    count = min(num_channels, MOST_CHANNELS)
    step = num_channels // count
    return slice(0, step * count, step)


def _central_tap(geometry: LayerGeometry) -> tuple[int, int]:
    """Return the first tap, down and across, that reads no padding before an image: a view of its inputs will do."""
    vertical, horizontal = (
        min(-(-padding // dilation), size - 1)
        for padding, dilation, size in zip(
            (geometry.padding[2], geometry.padding[0]), geometry.dilation, geometry.kernel_size, strict=True
        )
    )
    return vertical, horizontal
