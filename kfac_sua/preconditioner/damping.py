"""Tikhonov damping rules: how the damping ε I of a layer's block is split between its two factors.

The block is ``scale · Ḡ ⊗ Ā`` (scale = S under ``expand``, 1 under ``reduce``), so that ε on the block is ε/scale on
the product of the factors. The ``exact`` rule splits nothing: see ``kronecker.KroneckerEigenbasis``.
"""

import math

import torch
from torch import Tensor


def factored(damping: float, scale: float) -> float:
    """Return the damping √(ε/scale) of either factor.

    Reference: Martens & Grosse (2015), Sec. 6.3, with π = 1; the convention of the first author's public code
    (EKFAC-pytorch).
    """
    return math.sqrt(damping / scale)


def factored_pi(
    damping: float, scale: float, activation_means: Tensor, gradient_means: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the dampings π √(ε/scale) and √(ε/scale) / π of the activation and the gradient factor.

    π² is the ratio of the factors' mean eigenvalues; where either factor is zero, π = 1.

    Reference: Martens & Grosse (2015), Sec. 6.3.

    Args:
        damping: ε on the layer's block.
        scale: S under ``expand``, 1 under ``reduce``.
        activation_means: tr(Ā) / dim(Ā) over a whole layer, per convolution group, ``[conv_groups]``.
        gradient_means: tr(Ḡ) / dim(Ḡ), ``[conv_groups]``.

    Returns:
        Two tensors ``[conv_groups]``.
    """
    usable = (activation_means > 0) & (gradient_means > 0)
    ones = torch.ones_like(activation_means)
    pi = (torch.where(usable, activation_means, ones) / torch.where(usable, gradient_means, ones)).sqrt()
    root = math.sqrt(damping / scale)
    return root * pi, root / pi
