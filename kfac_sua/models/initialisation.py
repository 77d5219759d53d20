"""Initial weights, which the paper leaves open: the schemes to choose from, each with its source."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

DEFAULT_SCHEME = "he_fan_out"
CLASSIFIER_STD = 0.01  # so that training starts near equal class probabilities


@dataclass(frozen=True)
class Scheme:
    """What sets the parameters of each kind of layer in place, from the global generator.

    Attributes:
        convolution: Of every convolution.
        hidden: Of every linear layer but the classifier; of these networks only the transformer has any.
        classifier: Of the last linear layer.
    """

    convolution: Callable[[nn.Conv2d], None]
    hidden: Callable[[nn.Linear], None]
    classifier: Callable[[nn.Linear], None]


def initialise_(model: nn.Module, scheme: str = DEFAULT_SCHEME) -> None:
    """Set the initial weights of every convolution and linear layer in place, from the global generator.

    Normalisation layers keep PyTorch's scale 1 and shift 0. Biases are zero but for those that PyTorch draws.

    - ``he_fan_out``: convolutions normal with variance 2 / (out_channels · kernel height · kernel width), which keeps
      the scale of gradients. Those with a bias, which no batch normalisation follows, have in_channels instead, which
      keeps the scale of activations: in VGG11 it would otherwise shrink by √(512/3), and SGD at learning rates up to
      0.01 would spend its first epochs on a plateau. The classifier normal with standard deviation 0.01, other linear
      layers normal with variance 1 / in_features, which keeps the scale of normalised inputs.
    - ``he_fan_in``: convolutions normal with variance 2 / (in_channels · kernel height · kernel width), the
      classifier as PyTorch makes it, other linear layers as above.
    - ``xavier``: all weights uniform with variance 2 / (fan in + fan out), which weighs activations and gradients alike
      but makes up for no ReLU.
    - ``pytorch``: all as PyTorch makes them: weights uniform with variance 1 / (3 · fan in), a sixth of that of
      ``he_fan_in``, and biases uniform with the same variance.

    Args:
        model: The network; of its linear layers the classifier is registered last.
        scheme: Name of one of ``SCHEMES``.

    Raises:
        ValueError: If there is no such scheme.

    Reference: He et al. (2015), "Delving Deep into Rectifiers", eq. 14 (fan-out) and eq. 10 (fan-in); LeCun et al.
    (1998), "Efficient BackProp", eq. 16 (hidden linear layers); Glorot & Bengio (2010), "Understanding the Difficulty
    of Training Deep Feedforward Neural Networks", eq. 16 (``xavier``); ``reset_parameters`` of PyTorch's layers.
    """
    if scheme not in SCHEMES:
        raise ValueError(f"model.initialisation must be one of {', '.join(SCHEMES)}, got '{scheme}'.")
    own = SCHEMES[scheme]
    classifier = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            own.convolution(module)
        elif isinstance(module, nn.Linear):
            (own.classifier if module is classifier else own.hidden)(module)


def _he_fan_out(layer: nn.Conv2d) -> None:
    if layer.bias is None:
        nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    else:
        _he_fan_in(layer)


def _he_fan_in(layer: nn.Conv2d) -> None:
    nn.init.kaiming_normal_(layer.weight, mode="fan_in", nonlinearity="relu")
    _no_bias(layer)


def _lecun(layer: nn.Linear) -> None:
    nn.init.normal_(layer.weight, std=1 / math.sqrt(layer.in_features))
    _no_bias(layer)


def _small(layer: nn.Linear) -> None:
    nn.init.normal_(layer.weight, std=CLASSIFIER_STD)
    _no_bias(layer)


def _xavier(layer: nn.Conv2d | nn.Linear) -> None:
    nn.init.xavier_uniform_(layer.weight)
    _no_bias(layer)


def _pytorch(layer: nn.Conv2d | nn.Linear) -> None:
    layer.reset_parameters()


def _no_bias(layer: nn.Conv2d | nn.Linear) -> None:
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


SCHEMES = {
    DEFAULT_SCHEME: Scheme(_he_fan_out, _lecun, _small),
    "he_fan_in": Scheme(_he_fan_in, _lecun, _pytorch),
    "xavier": Scheme(_xavier, _xavier, _xavier),
    "pytorch": Scheme(_pytorch, _pytorch, _pytorch),
}
"""The schemes by name."""
