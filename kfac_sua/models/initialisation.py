"""Initial weights, which the paper leaves open: such that signals keep their scale, and small for the classifier."""

from __future__ import annotations

import math

from torch import nn

CLASSIFIER_STD = 0.01


def initialise_(model: nn.Module) -> None:
    """Set the initial weights of every convolution and linear layer in place, from the global generator.

    For convolutions, normal with variance 2 / (out_channels · kernel height · kernel width), which keeps the scale of
    gradients. Those with a bias, which no batch normalisation follows, have in_channels instead, which keeps the
    scale of activations: in VGG11 it would otherwise shrink by √(512/3), and SGD at learning rates up to 0.01 would
    spend its first epochs on a plateau. For the last linear layer, the classifier, normal with standard deviation
    0.01, so that training starts near equal class probabilities; for all others normal with variance 1 / in_features,
    which keeps the scale of normalised inputs. Every bias is zero. Normalisation layers keep PyTorch's scale 1 and
    shift 0.

    Args:
        model: The network; of its linear layers the classifier is registered last.

    Reference: He et al. (2015), "Delving Deep into Rectifiers", eq. 14 (the fan-out form) and eq. 10 (fan-in); LeCun
    et al. (1998), "Efficient BackProp", eq. 16 (linear layers).
    """
    classifier = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            if module.bias is None:
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            else:
                nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            std = CLASSIFIER_STD if module is classifier else 1 / math.sqrt(module.in_features)
            nn.init.normal_(module.weight, std=std)
            nn.init.zeros_(module.bias)
