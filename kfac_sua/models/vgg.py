"""VGG11 for 32×32 images, with batch normalisation the network of Figure 1."""

from __future__ import annotations

from torch import Tensor, nn

from kfac_sua.models.initialisation import DEFAULT_SCHEME, initialise_
from kfac_sua.models.width import scale_channels

# Output channels of each convolution at width 1; None halves the resolution.
VGG11_LAYERS = (64, None, 128, None, 256, 256, None, 512, 512, None, 512, 512, None)


class VGG11(nn.Module):
    """Eight 3×3 convolutions with batch normalisation and ReLU, five poolings, and one linear layer.

    Configuration A of Simonyan & Zisserman with its three fully connected layers replaced by one: the paper's
    largest factor, 4608 = 512·9, rules out a wider head and any bias of a convolution. Without batch normalisation
    each convolution has a bias, as in configuration A itself.

    Args:
        num_classes: Number of classes.
        width: Multiplies all channels (rounded, at least 8); 1 is the paper's network.
        batch_norm: Whether batch normalisation follows each convolution; the paper's network has it.
        initialisation: Scheme of the initial weights (``initialisation.SCHEMES``).

    Raises:
        ValueError: If ``width`` is not finite and positive, or there is no such scheme.

    Reference: Laurent et al. (2018), Sec. 3.1; Simonyan & Zisserman (2014), Table 1, column A.
    """

    def __init__(
        self, num_classes: int, width: float = 1.0, batch_norm: bool = True, initialisation: str = DEFAULT_SCHEME
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        in_channels = 3
        for base_channels in VGG11_LAYERS:
            if base_channels is None:
                layers.append(nn.MaxPool2d(2))
                continue
            out_channels = scale_channels(base_channels, width)
            layers.append(nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=not batch_norm))
            if batch_norm:
                layers.append(nn.BatchNorm2d(out_channels))
            layers.append(nn.ReLU(inplace=True))
            in_channels = out_channels
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(in_channels, num_classes)
        initialise_(self, initialisation)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the logits, ``[batch, num_classes]``, of images ``[batch, 3, 32, 32]``."""
        return self.classifier(self.features(inputs).flatten(1))  # of [batch, channels]
