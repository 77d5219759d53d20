"""Does what was recorded of a layer add up to its weight gradient?

The weight gradient of recorded calls is Σ δ hᵀ. A few random numbers of it, uᵀ (Σ δ hᵀ) v = Σ (u·δ)(v·h), are compared
with the same numbers of the gradient that autograd hands to ``.grad``: before hooks on it, clipping, unscaling, weight
decay and the average over processes, none of which can make it differ. It does where the weight is also used without a
call that is recorded. A part along the weight itself, the gradient of a penalty on its squares, is left out.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from kfac_sua.preconditioner.forms.unfold import pad, to_locations
from kfac_sua.preconditioner.geometry import LayerGeometry
from kfac_sua.preconditioner.precision import at_least_float32

NUM_PROJECTIONS = 3
"""Numbers compared: one that the part along the weight takes up, and two that would have to agree by chance."""

TOLERANCE = 0.05
"""Difference, relative to the numbers, beyond which they do not agree. The foreign passes seen make 0.16 and more."""

ROUNDING = 0.01
"""The same, relative to the root of their terms' squares, below which sums that cancel lie. Rounding each term to
bfloat16, of a relative precision of 0.004, makes half of it."""


class GradientCheck:
    """Compares them for one layer, and for the first group of a grouped convolution.

    Args:
        geometry: The layer's geometry.
    """

    def __init__(self, geometry: LayerGeometry) -> None:
        self._geometry = geometry
        self._expected: dict[int, Tensor] = {}
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self._expected.clear()
        self._difference: Tensor | None = None
        self._sizes: Tensor | None = None

    def of_inputs(self, inputs: Tensor) -> Tensor:
        """Return v·h for every output location of one call.

        Args:
            inputs: Its inputs, ``[n, h, w, channels]``.

        Returns:
            ``[n, h', w', NUM_PROJECTIONS]``.
        """
        geometry = self._geometry
        locations = at_least_float32(inputs)[..., : geometry.in_channels]
        _, filters = _directions(geometry, locations.dtype, locations.device)
        if geometry.num_taps == 1 and not any(geometry.padding):
            vertical, horizontal = geometry.stride
            return locations[:, ::vertical, ::horizontal] @ filters.flatten(1).mT  # [n, h', w', k]
        padded = pad(locations, geometry).permute(0, 3, 1, 2)  # [n, in, h, w]
        outputs = F.conv2d(padded, filters, None, geometry.stride, 0, geometry.dilation)  # [n, k, h', w']
        return outputs.permute(0, 2, 3, 1)  # [n, h', w', k]

    def expect(self, task: int, of_inputs: Tensor, output_grads: Tensor) -> None:
        """Take in the output gradients of a call.

        Args:
            task: The backward pass that brings them.
            of_inputs: What :meth:`of_inputs` returned for the call.
            output_grads: Gradient with respect to its output.
        """
        geometry = self._geometry
        grads = at_least_float32(to_locations(output_grads.detach(), geometry))[..., : geometry.out_channels]
        directions, _ = _directions(geometry, grads.dtype, grads.device)
        terms = of_inputs.to(grads.dtype) * (grads @ directions.mT)  # [n, h', w', k]
        numbers = torch.stack([terms.sum((0, 1, 2)), terms.square().sum((0, 1, 2))])  # [2, k]
        self._expected[task] = self._expected[task] + numbers if task in self._expected else numbers

    def compare(self, task: int, grad: Tensor) -> None:
        """Compare with the gradient that a backward pass hands to ``.grad``.

        Args:
            task: The backward pass.
            grad: In the shape of the weight.
        """
        if task not in self._expected:
            return
        expected, squares = self._expected.pop(task)  # [k] each
        got = self._of_weight(grad)
        difference, sizes = got - expected, torch.stack([got.square(), expected.square(), squares]).sum(1)  # [k], [3]
        self._difference = difference if self._difference is None else self._difference + difference
        self._sizes = sizes if self._sizes is None else self._sizes + sizes

    def fails(self, weight: Tensor) -> Tensor | None:
        """Return whether they differ, a 0-d bool tensor on the device; ``None`` if nothing was compared.

        Numbers that are not finite never do.
        """
        if self._difference is None or self._sizes is None:
            return None
        along = self._of_weight(weight)  # [k]
        along = along / along.norm().clamp(min=torch.finfo(along.dtype).tiny)
        rest = self._difference - along * (along @ self._difference)  # [k]
        of_got, of_expected, of_terms = self._sizes.sqrt()
        return rest.norm() > TOLERANCE * torch.maximum(of_got, of_expected) + ROUNDING * of_terms

    def _of_weight(self, values: Tensor) -> Tensor:
        """Return uᵀ V v of a tensor in the shape of the weight, ``[NUM_PROJECTIONS]``."""
        matrix = at_least_float32(values.detach())[: self._geometry.out_channels].flatten(1)  # [out, in · taps]
        directions, filters = _directions(self._geometry, matrix.dtype, matrix.device)
        return (directions @ matrix * filters.flatten(1)).sum(1)  # of [k, in · taps]


@lru_cache(maxsize=256)
def _directions(geometry: LayerGeometry, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the random directions u, ``[k, out]``, and v, ``[k, in, kh, kw]``: the same in every step."""
    generator = torch.Generator().manual_seed(0)
    shapes = (geometry.out_channels,), (geometry.in_channels, *geometry.kernel_size)
    drawn = (torch.randn(NUM_PROJECTIONS, *shape, generator=generator, dtype=torch.float64) for shape in shapes)
    of_outputs, of_inputs = (one.to(device, dtype) for one in drawn)
    return of_outputs, of_inputs
