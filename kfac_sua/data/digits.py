"""Scikit-learn's handwritten digits in the shape of CIFAR: real images on a machine without a network."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from kfac_sua.data.sizes import IMAGE_SHAPE, SIZES
from kfac_sua.data.splits import ImageSet, draw_balanced

TEST_SEED = 0


def load_digits() -> tuple[ImageSet, ImageSet, list[str]]:
    """Return the 1,797 handwritten digits, resized from 8×8 to 3×32×32.

    Grey levels 0 to 16 are scaled to 0 to 255, interpolated bilinearly (pixel centres, no corner alignment),
    rounded, and repeated over three equal channels. The stratified test images are always the same.

    Returns:
        1,500 training images, 297 test images, and the class names ``"0"`` to ``"9"``.

    Reference: the UCI "Optical Recognition of Handwritten Digits" test set, as embedded in scikit-learn.
    """
    # Imported here because it takes about a second, which a CIFAR run should not pay.
    from sklearn.datasets import load_digits as load_digits_bunch

    bunch = load_digits_bunch()
    small = torch.from_numpy(bunch.images).float()[:, None] * (255 / 16)  # [1797, 1, 8, 8]
    large = F.interpolate(small, size=IMAGE_SHAPE[1:], mode="bilinear", align_corners=False)
    images = large.round().to(torch.uint8).repeat(1, 3, 1, 1)  # [1797, 3, 32, 32]
    everything = ImageSet(images, torch.from_numpy(bunch.target).long())

    size, generator = SIZES["digits"], torch.Generator().manual_seed(TEST_SEED)
    test_indices = draw_balanced(everything.labels, size.test, size.classes, generator, size_key="SIZES")
    is_training = torch.ones(len(everything), dtype=torch.bool)
    is_training[test_indices] = False
    train = everything.select(is_training.nonzero().flatten())
    return train, everything.select(test_indices), [str(name) for name in bunch.target_names]
