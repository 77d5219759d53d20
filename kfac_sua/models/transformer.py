"""A small vision transformer for 32×32 images: a network of linear layers on sequences."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac_sua.models.initialisation import DEFAULT_SCHEME, initialise_
from kfac_sua.models.width import scale_channels

NUM_BLOCKS = 4  # a third of ViT-B: a step on 100 images takes about 5 s on one CPU core
NUM_HEADS = 4
HEAD_CHANNELS = 64  # at width 1, as in every model of the source (Table 1: 768 / 12, 1024 / 16, 1280 / 16)
MLP_EXPANSION = 4  # as in every model of the source (Table 1: 3072 / 768)
# Rows and columns of a patch: 16 · 8 = 128 of them cover an image, the sequence that this network is there for.
PATCH_HEIGHT, PATCH_WIDTH = 2, 4
NUM_PATCHES = (32 // PATCH_HEIGHT) * (32 // PATCH_WIDTH)
PATCH_SIZE = 3 * PATCH_HEIGHT * PATCH_WIDTH
POSITION_STD = 0.02  # as in the source's code: small beside the patches' embeddings, whose variance is about 1


def cut_patches(images: Tensor) -> Tensor:
    """Cut images into patches of 2×4 pixels.

    Args:
        images: ``[batch, 3, 32, 32]``, in either memory layout.

    Returns:
        ``[batch, 128, 24]``: patches row by row, and of each the numbers by colour, row and column.
    """
    rows = images.unflatten(2, (-1, PATCH_HEIGHT))  # [batch, 3, 16, 2, 32]
    pixels = rows.unflatten(4, (-1, PATCH_WIDTH))  # [batch, 3, 16, 2, 8, 4]
    by_patch = pixels.permute(0, 2, 4, 1, 3, 5)  # [batch, 16, 8, 3, 2, 4]
    return by_patch.flatten(3).flatten(1, 2)  # [batch, 128, 24]


class SelfAttention(nn.Module):
    """Multi-head self-attention of every token to every other, between two linear layers.

    Both are called as modules, so that both are preconditioned; those of ``nn.MultiheadAttention`` are not.

    Args:
        channels: Of each token; a multiple of the four heads.

    Reference: Vaswani et al. (2017), "Attention Is All You Need", Sec. 3.2.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(channels, 3 * channels)
        self.output = nn.Linear(channels, channels)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return ``[batch, tokens, channels]``, the shape of the inputs."""
        split = self.qkv(inputs).unflatten(2, (3, NUM_HEADS, -1))  # [batch, tokens, 3, heads, channels / heads]
        queries, keys, values = split.permute(2, 0, 3, 1, 4)  # [batch, heads, tokens, channels / heads] each
        attended = F.scaled_dot_product_attention(queries, keys, values)
        return self.output(attended.transpose(1, 2).flatten(2))  # heads side by side: [batch, tokens, channels]


class TransformerBlock(nn.Module):
    """Self-attention and an MLP with GELU, each after layer normalisation and added to its own input.

    Args:
        channels: Of each token; a multiple of the four heads.

    Reference: Xiong et al. (2020), "On Layer Normalization in the Transformer Architecture", Fig. 1(b).
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attention = SelfAttention(channels)
        self.norm2 = nn.LayerNorm(channels)
        self.expand = nn.Linear(channels, MLP_EXPANSION * channels)
        self.contract = nn.Linear(MLP_EXPANSION * channels, channels)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return ``[batch, tokens, channels]``, the shape of the inputs."""
        hidden = inputs + self.attention(self.norm1(inputs))
        return hidden + self.contract(F.gelu(self.expand(self.norm2(hidden))))


class VisionTransformer(nn.Module):
    """An embedding of 128 patches with learned positions, four pre-norm blocks, the mean over patches, a linear layer.

    Not in the paper, whose networks are convolutional: here all layers that can be preconditioned are linear, and all
    but the last share their weights over the 128 tokens of an example, as a convolution does over its locations. A
    linear layer has one tap, so SUA is K-FAC here; channel groups remain. There is neither a class token, whose place
    the mean takes, nor dropout. For 10 classes it has 3,201,290 parameters: 6,400 of the embedding, 32,768 of
    positions, 789,760 of each block, 512 of the final normalisation and 2,570 of the classifier.

    Args:
        num_classes: Number of classes.
        width: Multiplies the 64 channels of each of the four heads (rounded, at least 8), and so the 256 of tokens.
        initialisation: Scheme of the initial weights (``initialisation.SCHEMES``).

    Raises:
        ValueError: If ``width`` is not finite and positive, or there is no such scheme.

    Reference: Dosovitskiy et al. (2021), "An Image Is Worth 16x16 Words", Sec. 3.1; with pre-norm blocks, as there,
    after Xiong et al. (2020).
    """

    def __init__(self, num_classes: int, width: float = 1.0, initialisation: str = DEFAULT_SCHEME) -> None:
        super().__init__()
        channels = NUM_HEADS * scale_channels(HEAD_CHANNELS, width)  # by head, or these would not divide it
        self.embedding = nn.Linear(PATCH_SIZE, channels)
        self.positions = nn.Parameter(torch.empty(NUM_PATCHES, channels))
        self.blocks = nn.Sequential(*(TransformerBlock(channels) for _ in range(NUM_BLOCKS)))
        self.final_norm = nn.LayerNorm(channels)
        self.classifier = nn.Linear(channels, num_classes)
        initialise_(self, initialisation)
        nn.init.normal_(self.positions, std=POSITION_STD)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the logits, ``[batch, num_classes]``, of images ``[batch, 3, 32, 32]``."""
        tokens = self.embedding(cut_patches(inputs)) + self.positions  # [batch, 128, channels]
        hidden = self.final_norm(self.blocks(tokens))
        return self.classifier(hidden.mean(dim=1))  # over the tokens: [batch, channels]
