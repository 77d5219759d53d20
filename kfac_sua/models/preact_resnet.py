"""Pre-activation ResNet50 for 32×32 images, the network of Figure 2."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from kfac_sua.models.initialisation import DEFAULT_SCHEME, initialise_
from kfac_sua.models.width import scale_channels

EXPANSION = 4
BLOCKS_PER_STAGE = (3, 4, 6, 3)
# Of each bottleneck, at width 1; a stage's output has EXPANSION times as many.
STAGE_CHANNELS = (64, 128, 256, 512)


class PreActBottleneck(nn.Module):
    """1×1, 3×3 and 1×1 convolution, each after batch normalisation and ReLU, added to a shortcut.

    The shortcut is the block's input as it is; where the shape changes, it is a 1×1 convolution of the
    pre-activated input. The stride lies in the 3×3 convolution, so that no position is dropped unread on the
    residual branch.

    Args:
        in_channels: Channels of the block's input.
        bottleneck_channels: Channels of the 3×3 convolution; the output has four times as many.
        stride: Stride of the block, 1 or 2.

    Reference: He et al. (2016b), "Identity Mappings in Deep Residual Networks", Fig. 1(b) and Sec. 4.
    """

    def __init__(self, in_channels: int, bottleneck_channels: int, stride: int) -> None:
        super().__init__()
        out_channels = EXPANSION * bottleneck_channels
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, bottleneck_channels, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(bottleneck_channels)
        self.conv2 = nn.Conv2d(bottleneck_channels, bottleneck_channels, 3, stride=stride, padding=1, bias=False)
        self.norm3 = nn.BatchNorm2d(bottleneck_channels)
        self.conv3 = nn.Conv2d(bottleneck_channels, out_channels, 1, bias=False)
        self.projection: nn.Conv2d | None = None
        if stride != 1 or in_channels != out_channels:
            self.projection = nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return ``[batch, 4 * bottleneck_channels, height / stride, width / stride]``."""
        activated = F.relu(self.norm1(inputs), inplace=True)
        shortcut = inputs if self.projection is None else self.projection(activated)
        hidden = self.conv1(activated)
        hidden = self.conv2(F.relu(self.norm2(hidden), inplace=True))
        hidden = self.conv3(F.relu(self.norm3(hidden), inplace=True))
        return hidden + shortcut  # not in place: that would change a tensor which gradient hooks watch


class PreActResNet50(nn.Module):
    """A 3×3 stem, 16 pre-activation bottlenecks in four stages, a final normalisation, and one linear layer.

    The stem has stride 1 and no pooling, as is usual for 32×32 images; neither normalisation nor ReLU follows
    it, since the first block begins with its own.

    Args:
        num_classes: Number of classes.
        width: Multiplies the stem's and all bottleneck channels (rounded, at least 8); 1 is the paper's
            network.
        initialisation: Scheme of the initial weights (``initialisation.SCHEMES``).

    Raises:
        ValueError: If ``width`` is not finite and positive, or there is no such scheme.

    Reference: Laurent et al. (2018), Sec. 3.2; He et al. (2016b).
    """

    def __init__(self, num_classes: int, width: float = 1.0, initialisation: str = DEFAULT_SCHEME) -> None:
        super().__init__()
        in_channels = scale_channels(STAGE_CHANNELS[0], width)
        self.stem = nn.Conv2d(3, in_channels, 3, padding=1, bias=False)
        blocks: list[nn.Module] = []
        for stage, (num_blocks, base_channels) in enumerate(zip(BLOCKS_PER_STAGE, STAGE_CHANNELS, strict=True)):
            bottleneck_channels = scale_channels(base_channels, width)
            for index in range(num_blocks):
                stride = 2 if stage > 0 and index == 0 else 1
                blocks.append(PreActBottleneck(in_channels, bottleneck_channels, stride))
                in_channels = EXPANSION * bottleneck_channels
        self.blocks = nn.Sequential(*blocks)
        self.final_norm = nn.BatchNorm2d(in_channels)
        self.classifier = nn.Linear(in_channels, num_classes)
        initialise_(self, initialisation)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the logits, ``[batch, num_classes]``, of images ``[batch, 3, 32, 32]``."""
        hidden = self.blocks(self.stem(inputs))
        activated = F.relu(self.final_norm(hidden), inplace=True)
        return self.classifier(activated.mean(dim=(2, 3)))  # global average pooling: [batch, channels]
