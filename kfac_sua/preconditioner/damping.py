"""Tikhonov damping rules: how ε I on a layer's block reaches its two factors.

The block is ``scale · Ā ⊗ Ḡ`` (scale = S under ``expand``, 1 under ``reduce``), so that ε on the block is ε/scale on
the product of the factors. The ``exact`` rule needs no split: see ``kronecker.KroneckerEigenbasis``.
"""

import math

import torch
from torch import Tensor


def factored(damping: float, scale: float) -> float:
    """Return the damping √(ε/scale) of either factor (the convention of the first author's public code)."""
    return math.sqrt(damping / scale)


def factored_pi(
    damping: float, scale: float, activation_means: Tensor, gradient_means: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the dampings π √(ε/scale) and √(ε/scale) / π of the activation and the gradient factor.

    π² is the ratio of the factors' mean eigenvalues (Martens & Grosse 2015, Sec. 6.3). Where either factor is zero the
    ratio says nothing and π = 1.

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
