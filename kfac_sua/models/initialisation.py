"""Initial weights, which the paper leaves open: He's for convolutions, small ones for the classifier."""

from __future__ import annotations

from torch import nn

CLASSIFIER_STD = 0.01


def initialise_(model: nn.Module) -> None:
    """Set the initial weights of every convolution and linear layer in place, from the global generator.

    For convolutions, normal with variance 2 / (out_channels · kernel height · kernel width); for linear
    layers, normal with standard deviation 0.01 and zero bias, so that training starts near equal class
    probabilities. Normalisation layers keep PyTorch's scale 1 and shift 0.

    Args:
        model: The network.

    Reference: He et al. (2015), "Delving Deep into Rectifiers", eq. 14 (the fan-out form).
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=CLASSIFIER_STD)
            nn.init.zeros_(module.bias)
