"""A convolutional network small enough to train within a test."""

from __future__ import annotations

from torch import Tensor, nn

from kfac_sua.models.initialisation import DEFAULT_SCHEME, initialise_
from kfac_sua.models.width import scale_channels


class TinyConvNet(nn.Module):
    """A strided and a plain 3×3 convolution with batch normalisation, two poolings, and one linear layer.

    Not in the paper: it has every kind of layer that the larger networks have, stride and padding included,
    with 6,426 parameters for 10 classes.

    Args:
        num_classes: Number of classes.
        width: Multiplies the 16 and 32 channels (rounded, at least 8).
        batch_norm: Whether batch normalisation follows each convolution; without it each convolution has a bias.
        initialisation: Scheme of the initial weights (``initialisation.SCHEMES``).

    Raises:
        ValueError: If ``width`` is not finite and positive, or there is no such scheme.
    """

    def __init__(
        self, num_classes: int, width: float = 1.0, batch_norm: bool = True, initialisation: str = DEFAULT_SCHEME
    ) -> None:
        super().__init__()
        first, second = scale_channels(16, width), scale_channels(32, width)
        self.features = nn.Sequential(
            nn.Conv2d(3, first, 3, stride=2, padding=1, bias=not batch_norm),
            *([nn.BatchNorm2d(first)] if batch_norm else []),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Conv2d(first, second, 3, padding=1, bias=not batch_norm),
            *([nn.BatchNorm2d(second)] if batch_norm else []),
            nn.ReLU(inplace=True),
            nn.AvgPool2d(4),
        )
        self.classifier = nn.Linear(4 * second, num_classes)
        initialise_(self, initialisation)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the logits, ``[batch, num_classes]``, of images ``[batch, 3, 32, 32]``."""
        return self.classifier(self.features(inputs).flatten(1))  # of [batch, 4 · channels]
