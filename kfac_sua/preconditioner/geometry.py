"""The shape of a layer and the block layout of its Fisher approximation.

A layer's weight gradient is viewed as ``[conv_groups, P, p, t, Q, d]``: P groups of p output channels, t taps under
the identity factor (SUA) and Q activation blocks of d features. K-FAC keeps its taps inside the features, so t = 1.
The last channel group may be smaller than the others; it is padded with zeros, which damping keeps apart.
"""

from dataclasses import dataclass
from enum import Enum
from functools import cached_property

import torch.nn.functional as F
from torch import Tensor

from kfac_sua.preconditioner.settings import Structure


@dataclass(frozen=True)
class LayerGeometry:
    """Shape of a linear or 2-d convolution layer; a linear layer is a 1×1 convolution over its extra dimensions.

    ``model.module_geometry`` reads it off a module.

    Args:
        in_channels: Input channels (features) of one convolution group.
        out_channels: Output channels (features) of one convolution group.
        conv_groups: ``groups`` of the convolution; 1 for a linear layer.
        kernel_size: Kernel height and width.
        stride: Vertical and horizontal stride.
        dilation: Vertical and horizontal dilation.
        padding: Pixels added left, right, top, bottom.
        padding_mode: ``zeros``, ``reflect``, ``replicate`` or ``circular``.
        has_bias: Whether a trainable bias is added.
        is_convolution: False for ``nn.Linear``.
    """

    in_channels: int
    out_channels: int
    conv_groups: int = 1
    kernel_size: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    padding_mode: str = "zeros"
    has_bias: bool = False
    is_convolution: bool = True

    @property
    def num_taps(self) -> int:
        """Kernel height times width."""
        return self.kernel_size[0] * self.kernel_size[1]

    @property
    def padding_before(self) -> tuple[int, int]:
        """Pixels added at the top and on the left."""
        left, _, top, _ = self.padding
        return top, left


@dataclass(frozen=True)
class ChannelGroups:
    """``num_channels`` channels in groups of ``size``; the last group may be smaller.

    Reference: channel grouping, Laurent et al. (2018), Sec. 2.2.
    """

    num_channels: int
    size: int

    @classmethod
    def of(cls, num_channels: int, group_size: int | None) -> "ChannelGroups":
        """Group by ``group_size``; ``None``, or a size above the number of channels, gives one group."""
        return cls(num_channels, min(group_size or num_channels, num_channels))

    @property
    def count(self) -> int:
        """Number of groups."""
        return -(-self.num_channels // self.size)

    @property
    def num_padded(self) -> int:
        """Zero channels added to fill the last group."""
        return self.count * self.size - self.num_channels

    def split(self, values: Tensor) -> Tensor:
        """Return ``[..., channels]`` as ``[..., count, size]``, with zeros that fill the last group."""
        if self.num_padded:
            values = F.pad(values, (0, self.num_padded))  # [..., count · size]
        return values.unflatten(-1, (self.count, self.size))  # [..., count, size]

    def merge(self, values: Tensor) -> Tensor:
        """Undo :meth:`split`: return ``[..., count, size]`` as ``[..., channels]``, without the padding."""
        return values.flatten(-2)[..., : self.num_channels]  # [..., channels]


class BiasBlock(Enum):
    """Which block of the Fisher approximation a layer's bias belongs to."""

    NONE = "none"
    """None: the layer has no trainable bias."""
    JOINT = "joint"
    """The weight's: a homogeneous coordinate of the activation factor (Martens & Grosse 2015, Sec. 2)."""
    SEPARATE = "separate"
    """A block of its own, with the scalar activation factor 1."""


@dataclass(frozen=True)
class BlockLayout:
    """Block structure of one layer.

    Reference: K-FAC: Grosse & Martens (2016); SUA: Laurent et al. (2018), Sec. 2.1; channel groups: Sec. 2.2.

    Args:
        conv_groups: Groups of the convolution, each with factors of its own.
        num_taps: Kernel taps.
        taps_in_features: True for K-FAC (features are channel × tap), False for SUA (identity over taps).
        activation: Channel groups of one convolution group's inputs.
        gradient: Channel groups of one convolution group's outputs.
        bias: Where the bias lives.
    """

    conv_groups: int
    num_taps: int
    taps_in_features: bool
    activation: ChannelGroups
    gradient: ChannelGroups
    bias: BiasBlock

    @classmethod
    def of(cls, geometry: LayerGeometry, structure: str, group_size: int | None) -> "BlockLayout":
        """Return the layout of a layer. On 1×1 kernels and linear layers SUA *is* K-FAC."""
        taps_in_features = structure == Structure.kfac or geometry.num_taps == 1
        activation = ChannelGroups.of(geometry.in_channels, group_size)
        joint = taps_in_features and activation.count == 1
        bias = BiasBlock.JOINT if joint else BiasBlock.SEPARATE
        return cls(
            conv_groups=geometry.conv_groups,
            num_taps=geometry.num_taps,
            taps_in_features=taps_in_features,
            activation=activation,
            gradient=ChannelGroups.of(geometry.out_channels, group_size),
            bias=bias if geometry.has_bias else BiasBlock.NONE,
        )

    @cached_property
    def weight_shape(self) -> tuple[int, int, int, int, int, int]:
        """Shape in which a weight gradient is multiplied: ``(conv_groups, P, p, t, Q, d)``."""
        groups = self.gradient
        features = self.activation_blocks[1]
        return self.conv_groups, groups.count, groups.size, self.identity_taps, self.activation.count, features

    @cached_property
    def is_order_of_weights(self) -> bool:
        """Whether a view of a weight gradient ``[out, taps, in]`` has the shape :attr:`weight_shape`.

        Not where groups are padded, where the bias is joint, or where K-FAC's channel groups are inside its taps.
        """
        is_padded = self.gradient.num_padded or self.activation.num_padded
        is_reordered = self.feature_taps > 1 and self.activation.count > 1
        return not is_padded and not is_reordered and self.bias is not BiasBlock.JOINT

    @property
    def identity_taps(self) -> int:
        """Taps under the identity factor: kh·kw for SUA, 1 otherwise."""
        return 1 if self.taps_in_features else self.num_taps

    @property
    def feature_taps(self) -> int:
        """Taps inside a feature block: kh·kw for K-FAC, 1 otherwise."""
        return self.num_taps if self.taps_in_features else 1

    @property
    def activation_blocks(self) -> tuple[int, int]:
        """Number and width of the activation factor's blocks."""
        width = self.activation.size * self.feature_taps + (self.bias is BiasBlock.JOINT)
        return self.conv_groups * self.activation.count, width

    @property
    def gradient_blocks(self) -> tuple[int, int]:
        """Number and width of the gradient factor's blocks."""
        return self.conv_groups * self.gradient.count, self.gradient.size

    @property
    def activation_dim(self) -> int:
        """Width of one convolution group's activation factor without padding; the pi rule divides its trace by it."""
        return self.activation.num_channels * self.feature_taps + (self.bias is BiasBlock.JOINT)

    @property
    def gradient_dim(self) -> int:
        """Width of one convolution group's gradient factor without padding."""
        return self.gradient.num_channels
