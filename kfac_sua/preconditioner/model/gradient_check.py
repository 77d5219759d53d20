"""Checks that the recorded calls of a layer explain its weight gradient.

The weight gradient of recorded calls is Σ δ hᵀ. Some of its entries, each a sum of products δᵢ hⱼ, are compared with
the same entries of the gradient that autograd hands to ``.grad``. That is before hooks on ``.grad``, clipping,
unscaling, weight decay and averages over processes, so none of these makes the two differ. They differ if the weight is
also used without a recorded call. The part along the weight itself, the gradient of a penalty on its squares, is left
out.

On a GPU a refresh must save launches: the check takes four per layer, and some for all layers together.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kfac_sua.preconditioner.forms.unfold import output_size, pad, to_locations
from kfac_sua.preconditioner.geometry import LayerGeometry
from kfac_sua.preconditioner.precision import at_least_float32

MOST_CHANNELS = 4
"""Channels compared on either side: 16 entries, of which the part along the weight takes up one. More channels would
read more of inputs and gradients."""

TOLERANCE = 0.05
"""Relative difference of the entries from which on they do not agree. In all cases seen, uses
without a recorded call made them differ by 0.16 or more."""

ROUNDING = 0.01
"""Difference relative to the root of the terms' summed squares that rounding may make where the terms cancel. Rounding
each term to bfloat16, whose relative precision is 0.004, makes half of it."""

EXACT = 1e-3
"""Relative distance within which ``.grad`` is a multiple of what one pass has added. Averages over processes, and
noise, are farther from it."""


@dataclass(frozen=True)
class Terms:
    """Products δᵢ hⱼ of one call, for some i and j: how many, and their mean and variance, ``[outs, ins]`` each."""

    count: int
    means: Tensor
    variances: Tensor


@dataclass(frozen=True)
class Spread:
    """A few channels, spread evenly over all.

    Args:
        count: Channels taken.
        step: Distance between two of them.
    """

    count: int
    step: int

    @classmethod
    def over(cls, num_channels: int) -> "Spread":
        """Return at most :data:`MOST_CHANNELS` of some channels."""
        count = min(num_channels, MOST_CHANNELS)
        return cls(count, num_channels // count)


class GradientCheck:
    """Compares the entries of one layer: of a few channels, one tap of the kernel, the first group of a convolution.

    Args:
        geometry: The layer's geometry.
    """

    def __init__(self, geometry: LayerGeometry) -> None:
        self._geometry = geometry
        self._ins = Spread.over(geometry.in_channels)
        self._outs = Spread.over(geometry.out_channels)
        # The first tap, down and across, that reads no padding before an image: a view of its inputs will do.
        vertical, horizontal = (
            min(-(-padding // dilation), size - 1)
            for padding, dilation, size in zip(
                geometry.padding_before, geometry.dilation, geometry.kernel_size, strict=True
            )
        )
        self._tap = vertical, horizontal
        self.discarded: Tensor | None = None
        self._expected: dict[int, list[Terms]] = {}
        self.clear()

    def discard(self) -> None:
        """Forget the gradient taken in, which seems to have been thrown away."""
        total = self.accumulated
        if self.discarded is not None and total is not None:
            total = self.discarded + total
        self.clear()
        self.discarded = total  # .grad may become this again

    def clear(self) -> None:
        """Forget everything."""
        self._expected.clear()
        self.discarded = None
        self.terms: list[Terms] = []
        self.accumulated: Tensor | None = None
        self.last: Tensor | None = None
        self.num_passes = 0

    def read_inputs(self, inputs: Tensor) -> Tensor:
        """Return hⱼ at every output location of one call, for some j.

        Args:
            inputs: Its inputs, ``[n, h, w, channels]``.

        Returns:
            ``[n, h', w', ins]``, a copy.
        """
        geometry = self._geometry
        sizes = output_size(geometry, inputs.shape[1], inputs.shape[2])
        reads = [dilation * tap for dilation, tap in zip(geometry.dilation, self._tap, strict=True)]
        starts = [read - padding for read, padding in zip(reads, geometry.padding_before, strict=True)]
        ends = [start + stride * (size - 1) for start, stride, size in zip(starts, geometry.stride, sizes, strict=True)]
        if min(starts) < 0 or ends[0] >= inputs.shape[1] or ends[1] >= inputs.shape[2]:  # where padding is read
            inputs, starts = pad(inputs, geometry), reads
        along, down, across, between = inputs.stride()
        window = inputs.as_strided(  # one view for all slices: views take the host's time too
            (len(inputs), *sizes, self._ins.count),
            (along, down * geometry.stride[0], across * geometry.stride[1], between * self._ins.step),
            inputs.storage_offset() + down * starts[0] + across * starts[1],
        )
        return at_least_float32(window).clone()  # [n, h', w', ins]

    def expect(self, task: int, read_inputs: Tensor, output_grads: Tensor) -> None:
        """Take in the output gradients of a call, whose entries the gradient is expected to have.

        Args:
            task: The backward pass that brings them.
            read_inputs: What :meth:`read_inputs` returned for the call.
            output_grads: Gradient with respect to its output.
        """
        grads = to_locations(output_grads.detach(), self._geometry)
        own = grads.as_strided(  # [n, h', w', outs, 1]
            (*grads.shape[:3], self._outs.count, 1),
            (*grads.stride()[:3], grads.stride(3) * self._outs.step, 1),
            grads.storage_offset(),
        )
        terms = at_least_float32(own) * read_inputs.unsqueeze(3)  # [n, h', w', outs, ins]
        variances, means = torch.var_mean(terms, (0, 1, 2), correction=0)  # [outs, ins] each
        self._expected.setdefault(task, []).append(Terms(terms.shape[:3].numel(), means, variances))

    def add_accumulated(self, task: int, grad: Tensor) -> None:
        """Take in the gradient that a backward pass hands to ``.grad``.

        Args:
            task: The backward pass.
            grad: In the shape of the weight.
        """
        self.terms += self._expected.pop(task, [])
        self.last = at_least_float32(self.entries(grad)).clone()
        self.num_passes += 1
        self.accumulated = self.last if self.accumulated is None else self.accumulated + self.last

    @property
    def is_empty(self) -> bool:
        """Whether no gradient has been taken in."""
        return self.accumulated is None

    def entries(self, values: Tensor) -> Tensor:
        """Return the entries that are compared, ``[outs, ins]``, a view of a tensor in the shape of the weight."""
        strides = values.stride()
        offset = sum(tap * stride for tap, stride in zip(self._tap, strides[2:], strict=False))
        return values.as_strided(
            (self._outs.count, self._ins.count),
            (strides[0] * self._outs.step, strides[1] * self._ins.step),
            values.storage_offset() + offset,
        )


@torch.no_grad()
def judge(checks: Sequence[GradientCheck], weights: Sequence[Tensor]) -> Tensor:
    """Return for each layer whether gradient and records differ, and whether ``.grad`` has been replaced since.

    The first is False for layers without records or gradient, and for entries that are not finite. The second is True
    if ``.grad`` is zero, or if it is a multiple of what the last pass, the earlier passes or passes whose gradient was
    thrown away have added, each apart from a part along the weight. Whatever else ``.grad`` has become may be intended.

    Args:
        checks: One per layer.
        weights: The layers' weights.

    Returns:
        ``[2, layers]``, bool, on the device of the first weight.
    """
    device = weights[0].device
    are_compared = [check.accumulated is not None and bool(check.terms) for check in checks]
    if not any(are_compared):
        return torch.zeros(2, len(checks), dtype=torch.bool, device=device)

    def stacked(read: Callable[[GradientCheck, Tensor], Tensor | None]) -> Tensor:
        """Return what is read of each layer, ``[layers, 16]``; zeros where nothing is compared."""
        rows = [
            _filled(read(check, weight) if is_compared else None, device)
            for check, weight, is_compared in zip(checks, weights, are_compared, strict=True)
        ]
        return torch.stack(rows).flatten(1)  # [layers, 16]

    compared = [check for check, is_compared in zip(checks, are_compared, strict=True) if is_compared]
    terms = [one for check in compared for one in check.terms]
    counts, means = [one.count for one in terms], [one.means for one in terms]
    second = torch._foreach_add(torch._foreach_mul(means, means), [one.variances for one in terms])
    sums, squares = (iter(torch._foreach_mul(some, counts)) for some in (means, second))
    got, last = stacked(lambda check, _: check.accumulated), stacked(lambda check, _: check.last)  # [layers, 16]
    expected = stacked(lambda check, _: _sum_of_next(sums, len(check.terms)))
    square_sums = stacked(lambda check, _: _sum_of_next(squares, len(check.terms)))
    along = stacked(lambda check, weight: check.entries(weight))
    now = stacked(lambda check, weight: None if weight.grad is None else check.entries(weight.grad))
    along, now = along.to(got.dtype), now.to(got.dtype)
    difference = got - expected
    norms = torch.stack([_without(difference, along), got, square_sums.sqrt()]).norm(dim=2)  # [3, layers]
    of_difference, of_got, of_terms = norms
    fail = (of_difference > TOLERANCE * of_got + ROUNDING * of_terms) & (of_got > 0)  # 0: lost in float16, or masked
    is_replaced = (_largest(weights, device) == 0) & (of_got > 0)  # of all entries, as a mask may zero these
    if any(check.num_passes > 1 or check.discarded is not None for check in compared):
        discarded = stacked(lambda check, _: check.discarded).to(got.dtype)
        others = (got, last, got - last, discarded, discarded + got)
        misfits = torch.stack([_misfit(now, one, along) for one in others])  # [5, layers]
        is_replaced |= (misfits[0] > TOLERANCE) & (misfits[1:].amin(0) < EXACT)
    return torch.stack([fail, is_replaced])  # [2, layers]


def _largest(weights: Sequence[Tensor], device: torch.device) -> Tensor:
    """Return the largest entry of each weight's gradient, ``[layers]``; 0 where there is none."""
    norms = iter(torch._foreach_norm([weight.grad for weight in weights if weight.grad is not None], torch.inf))
    zero = torch.zeros((), device=device)
    return torch.stack([zero if weight.grad is None else next(norms).to(device) for weight in weights])


def _without(values: Tensor, along: Tensor) -> Tensor:
    """Return vectors ``[layers, entries]`` without their part along others."""
    squares = (along * along).sum(1, keepdim=True).clamp(min=torch.finfo(along.dtype).tiny)  # [layers, 1]
    return values - along * ((values * along).sum(1, keepdim=True) / squares)


def _misfit(values: Tensor, others: Tensor, along: Tensor) -> Tensor:
    """Return how far vectors are from multiples of others, parts along the third apart, as a share, ``[layers]``."""
    whole, values, others = values, _without(values, along), _without(others, along)
    rest = _without(values, others).norm(dim=1)
    size = values.norm(dim=1)
    # Of one entry nothing but rounding is left without the part along the weight: that is no misfit.
    return torch.where(size > TOLERANCE * whole.norm(dim=1), rest / size, 0.0)


def _sum_of_next(tensors: Iterator[Tensor], count: int) -> Tensor:
    """Return the sum of the next few tensors: of the calls of a layer, mostly one."""
    total = next(tensors)
    for _ in range(count - 1):
        total = total + next(tensors)
    return total


def _filled(matrix: Tensor | None, device: torch.device) -> Tensor:
    """Return entries ``[4, 4]``, filled up with zeros where a layer has fewer channels."""
    if matrix is None:
        return torch.zeros(MOST_CHANNELS, MOST_CHANNELS, device=device)
    height, width = matrix.shape
    is_full = height == width == MOST_CHANNELS
    matrix = matrix if is_full else F.pad(matrix, (0, MOST_CHANNELS - width, 0, MOST_CHANNELS - height))
    return matrix.to(device)
