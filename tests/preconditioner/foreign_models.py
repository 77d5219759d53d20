"""Models of others, reduced where they are large, with what must happen to their layers."""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models.convnext import CNBlockConfig

EXAMPLES = 12
NORMALISED = "normalisation layer"
UNSUPPORTED = "{} is not supported (nn.Linear and nn.Conv2d are)"
OWN = "{} itself"
COMPUTED = "its weight is computed (parametrised), not a parameter"
UNCALLED = "nn.MultiheadAttention uses its weight without calling it"


@dataclass(frozen=True)
class ForeignModel:
    """One model, a mini-batch for it, and what is to happen.

    Args:
        make: Returns the model.
        inputs: Returns the inputs of a mini-batch, from a generator.
        preconditioned: How many layers are preconditioned.
        left: Reason to number of modules left to the plain gradient.
        loss: The loss of its outputs.
        events: What is reported besides, kind to number of layers.
    """

    make: Callable[[], nn.Module]
    inputs: Callable[[torch.Generator], Tensor]
    preconditioned: int
    left: Mapping[str, int] = field(default_factory=dict)
    loss: Callable[[Any], Tensor] = lambda outputs: F.cross_entropy(outputs, labels())
    events: Mapping[str, int] = field(default_factory=dict)


def labels() -> Tensor:
    """Return the classes of the mini-batch, four of them."""
    return torch.arange(EXAMPLES) % 4


def images(size: int, channels: int = 3) -> Callable[[torch.Generator], Tensor]:
    """Return what draws square images."""
    return lambda generator: torch.randn(EXAMPLES, channels, size, size, generator=generator)


class UNet(nn.Module):
    """Down by a strided convolution, up by a transposed one, with a skip connection."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(inplace=True))
        self.down = nn.Sequential(nn.Conv2d(12, 24, 3, 2, 1), nn.BatchNorm2d(24), nn.ReLU(inplace=True))
        self.up = nn.ConvTranspose2d(24, 12, 2, 2)
        self.leave = nn.Sequential(nn.Conv2d(24, 12, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(12, 4, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Return logits per pixel."""
        hidden = self.enter(x)
        return self.leave(torch.cat([hidden, self.up(self.down(hidden))], dim=1))


class LSTMClassifier(nn.Module):
    """An embedding, two LSTM layers and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 12)
        self.lstm = nn.LSTM(12, 16, num_layers=2, batch_first=True)
        self.head = nn.Linear(16, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits of the last state."""
        return self.head(self.lstm(self.embedding(tokens))[0][:, -1])


class Reused(nn.Module):
    """Applies one block three times, with residuals in place, and one layer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Conv2d(3, 8, 3, padding=1)
        self.block = nn.Conv2d(8, 8, 3, padding=1)
        self.alias = self.block
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        x = self.enter(x)
        for block in (self.block, self.alias, self.block):
            out = block(x)
            out += x
            x = out.relu_()
        return self.head(x.mean((2, 3)))


class Branches(nn.Module):
    """A branch that no mini-batch of ours takes, and outputs in a dict with a tuple in it."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(8, 16)
        self.rare = nn.Linear(8, 16)
        self.heads = nn.ModuleList([nn.Linear(16, 4), nn.Linear(16, 4)])

    def forward(self, x: Tensor, rare: bool = False) -> dict[str, Any]:
        """Return logits, and auxiliary ones."""
        hidden = (self.rare if rare else self.body)(x).relu()
        return {"logits": self.heads[0](hidden), "more": (self.heads[1](hidden), hidden)}


class Signals(nn.Module):
    """A volume through Conv3d, flattened to a signal through Conv1d."""

    def __init__(self) -> None:
        super().__init__()
        self.volume = nn.Conv3d(1, 6, 3)
        self.signal = nn.Conv1d(6, 8, 3)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        return self.head(self.signal(self.volume(x).flatten(2).relu()).relu().mean(2))


def discriminator() -> nn.Module:
    """Return spectral and weight normalisation of both kinds, and one plain layer."""
    modern, classic = nn.utils.parametrizations, nn.utils
    return nn.Sequential(
        modern.spectral_norm(nn.Conv2d(3, 8, 3, 2, 1)),
        nn.LeakyReLU(0.2, inplace=True),
        classic.spectral_norm(nn.Conv2d(8, 8, 3, 2, 1)),
        nn.LeakyReLU(0.2, inplace=True),
        modern.weight_norm(nn.Conv2d(8, 8, 3, 2, 1)),
        nn.Flatten(),
        nn.Linear(32, 4),
    )


def autoencoder() -> nn.Module:
    """Return an MLP with a bottleneck."""
    widths = (24, 16, 4, 16, 24)
    layers: list[nn.Module] = []
    for width, following in itertools.pairwise(widths):
        layers += [nn.Linear(width, following), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def in_place() -> nn.Module:
    """Return a sequence whose every activation works in place."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 8, 3, groups=2),
        nn.Hardswish(inplace=True),
        nn.Dropout2d(0.1, inplace=True),
        nn.Flatten(),
        nn.Linear(128, 16),
        nn.ReLU6(inplace=True),
        nn.Linear(16, 4),
    )


def frozen_backbone() -> nn.Module:
    """Return a ResNet18 of which only the last block and the head are trained."""
    net = torchvision.models.resnet18(num_classes=4)
    net.requires_grad_(False)
    net.layer4[1].requires_grad_(True)
    net.fc.requires_grad_(True)
    return net


def vision_transformer() -> nn.Module:
    """Return vit_b_16's class, reduced; its head begins at zero there, so that no gradient would get past it."""
    net = torchvision.models.VisionTransformer(
        image_size=16, patch_size=4, num_layers=2, num_heads=2, hidden_dim=24, mlp_dim=48, num_classes=4
    )
    nn.init.normal_(net.heads.head.weight, std=0.1)
    return net


def swin_transformer() -> nn.Module:
    """Return swin_t's class, reduced: its attention uses the weights of its linear layers without calling these."""
    return torchvision.models.SwinTransformer(
        [2, 2], embed_dim=16, depths=[1, 1], num_heads=[2, 4], window_size=[4, 4], num_classes=4
    )


def convnext() -> nn.Module:
    """Return convnext_tiny's class, reduced: linear layers on ``[n, h, w, c]``, depthwise convolutions."""
    return torchvision.models.ConvNeXt([CNBlockConfig(12, 24, 1), CNBlockConfig(24, None, 1)], num_classes=4)


def transformer_encoder() -> nn.Module:
    """Return PyTorch's own encoder layers with a head."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    return nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Flatten(), nn.Linear(96, 4))


def segmentation() -> nn.Module:
    """Return a segmentation model of torchvision's, whose outputs are a dict."""
    return torchvision.models.segmentation.lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=4)


def pixel_loss(outputs: Tensor) -> Tensor:
    """Return the loss of one image's class at each of its pixels."""
    classes = labels()[:, None, None].expand(-1, *outputs.shape[-2:])
    return F.cross_entropy(outputs, classes)


def reconstruction_loss(outputs: Tensor) -> Tensor:
    """Return half the squared distance to targets fixed once."""
    targets = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(9)).to(outputs) / 2
    return (outputs - targets).square().sum(1).mean() / 2


FOREIGN_MODELS: dict[str, ForeignModel] = {
    "resnet18": ForeignModel(lambda: torchvision.models.resnet18(num_classes=4), images(32), 21, {NORMALISED: 20}),
    "mobilenet_v3_small": ForeignModel(
        lambda: torchvision.models.mobilenet_v3_small(num_classes=4), images(32), 54, {NORMALISED: 34}
    ),
    "densenet121": ForeignModel(
        lambda: torchvision.models.densenet121(num_classes=4), images(32), 121, {NORMALISED: 121}
    ),
    "vit_b_16, reduced": ForeignModel(
        vision_transformer,
        images(16),
        6,
        {
            NORMALISED: 5,
            UNCALLED: 2,
            OWN.format("in_proj_weight, in_proj_bias of MultiheadAttention"): 2,
            OWN.format("class_token of VisionTransformer"): 1,
            OWN.format("pos_embedding of Encoder"): 1,
        },
    ),
    "swin_t, reduced": ForeignModel(
        swin_transformer,
        images(16),
        11,
        {NORMALISED: 7, OWN.format("relative_position_bias_table of ShiftedWindowAttention"): 2},
        events={"call_not_seen": 4},
    ),
    "convnext_tiny, reduced": ForeignModel(
        convnext, images(32), 9, {NORMALISED: 5, OWN.format("layer_scale of CNBlock"): 2}
    ),
    "nn.TransformerEncoder": ForeignModel(
        transformer_encoder,
        lambda generator: torch.randn(EXAMPLES, 6, 16, generator=generator),
        5,
        {NORMALISED: 4, UNCALLED: 2, OWN.format("in_proj_weight, in_proj_bias of MultiheadAttention"): 2},
    ),
    "U-Net": ForeignModel(
        UNet, images(8), 4, {NORMALISED: 2, UNSUPPORTED.format("ConvTranspose2d"): 1}, loss=pixel_loss
    ),
    "lraspp_mobilenet_v3_large": ForeignModel(
        segmentation, images(32), 66, {NORMALISED: 47}, loss=lambda outputs: pixel_loss(outputs["out"])
    ),
    "MLP auto-encoder": ForeignModel(
        autoencoder, lambda generator: torch.randn(EXAMPLES, 24, generator=generator), 4, loss=reconstruction_loss
    ),
    "LSTM classifier": ForeignModel(
        LSTMClassifier,
        lambda generator: torch.randint(0, 20, (EXAMPLES, 7), generator=generator),
        1,
        {UNSUPPORTED.format("Embedding"): 1, UNSUPPORTED.format("LSTM"): 1},
    ),
    "Conv1d and Conv3d": ForeignModel(
        Signals,
        lambda generator: torch.randn(EXAMPLES, 1, 5, 5, 5, generator=generator),
        1,
        {UNSUPPORTED.format("Conv1d"): 1, UNSUPPORTED.format("Conv3d"): 1},
    ),
    "resnet18, frozen backbone": ForeignModel(frozen_backbone, images(32), 3, {NORMALISED: 20, "frozen": 18}),
    "modules used several times": ForeignModel(Reused, images(8), 3),
    "in-place activations": ForeignModel(in_place, images(8), 4, {NORMALISED: 1}),
    "unused branch, dict of outputs": ForeignModel(
        Branches,
        lambda generator: torch.randn(EXAMPLES, 8, generator=generator),
        4,
        loss=lambda outputs: F.cross_entropy(outputs["logits"] + outputs["more"][0] / 2, labels()),
        events={"not_reached": 1},
    ),
    "spectral and weight norm": ForeignModel(discriminator, images(16), 1, {COMPUTED: 3}),
}
