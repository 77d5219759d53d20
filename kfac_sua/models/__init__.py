"""The paper's networks for 32×32 images, a transformer, and a tiny one for tests.

A convolution carries a bias only where batch normalisation, whose shift makes one idle, is left out.
"""

from kfac_sua.models.preact_resnet import PreActResNet50
from kfac_sua.models.tiny import TinyConvNet
from kfac_sua.models.transformer import VisionTransformer
from kfac_sua.models.vgg import VGG11

__all__ = ["VGG11", "PreActResNet50", "TinyConvNet", "VisionTransformer"]
