"""Image sets, the held-out split that selects hyper-parameters, and channel statistics.

The paper reports "the best performing curves" of a grid without saying on which images (Sec. 3). Here a
stratified part of the training images is held out for that choice, and the test set is touched once, at the
end.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


class DataError(Exception):
    """A data set that is missing, damaged, or too small for what was asked; the message is one sentence."""


@dataclass
class ImageSet:
    """Images with their classes, as stored: neither scaled nor normalised.

    Attributes:
        images: Grey levels 0 to 255, ``[num_images, 3, 32, 32]``, uint8, RGB.
        labels: Class of every image, ``[num_images]``, int64.

    Raises:
        ValueError: If shapes or dtypes differ from the above (any height and width are accepted).
    """

    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        if self.images.ndim != 4 or self.images.dtype != torch.uint8:
            raise ValueError(
                "images must be uint8 [num_images, channels, height, width], "
                f"got {self.images.dtype} {list(self.images.shape)}."
            )
        if self.labels.shape != self.images.shape[:1] or self.labels.dtype != torch.int64:
            raise ValueError(
                f"labels must be int64 [{len(self.images)}], got {self.labels.dtype} {list(self.labels.shape)}."
            )

    def __len__(self) -> int:
        return len(self.labels)

    def update(self, digest: hashlib._Hash) -> None:
        """Feed images and labels to a digest."""
        for values in (self.images, self.labels):
            digest.update(values.contiguous().numpy().data)

    def select(self, indices: Tensor) -> ImageSet:
        """Return the images at ``indices``, in that order, as a copy.

        Args:
            indices: Positions in this set, ``[num_selected]``, int64.

        Returns:
            An image set of ``num_selected`` images.
        """
        return ImageSet(self.images[indices], self.labels[indices])


@dataclass
class Splits:
    """The three image sets of a run and what every part of the run needs to know about them.

    Attributes:
        train: Images the network is trained on.
        val: Held-out training images, for the choice of hyper-parameters and the validation curves.
        test: Test images, evaluated once per run.
        num_classes: Number of classes.
        class_names: Their names, in the order of the labels.
        mean: Channel means of ``train`` alone, ``[3]``, float32, in units of [0, 1] grey levels.
        std: Channel standard deviations of ``train`` alone, ``[3]``, float32, in the same units.
    """

    train: ImageSet
    val: ImageSet
    test: ImageSet
    num_classes: int
    class_names: list[str]
    mean: Tensor
    std: Tensor

    def digest(self) -> str:
        """Return the SHA-256 of all images and labels, which must be the same when a run resumes."""
        digest = hashlib.sha256()
        for part in (self.train, self.val, self.test):
            part.update(digest)
        return digest.hexdigest()


def make_splits(
    train: ImageSet,
    test: ImageSet,
    class_names: Sequence[str],
    *,
    validation_size: int,
    train_size: int | None,
    split_seed: int,
) -> Splits:
    """Hold out validation images, then keep all or a balanced subset of the remaining training images.

    Both draws take equally many images of every class. They are nested: with the same seed, the held-out
    images do not depend on ``train_size``, and a smaller ``train_size`` draws from within a larger one.

    Args:
        train: All training images.
        test: All test images, passed through unchanged.
        class_names: Names of the classes, in the order of the labels.
        validation_size: Number of held-out images, at least 1.
        train_size: Number of images to train on; ``None`` keeps all that are not held out.
        split_seed: Seed of both draws, independent of the seed of the run.

    Returns:
        The splits, with channel statistics of the images that are trained on.

    Raises:
        DataError: If there are too few images, in all or of one class, or if a colour channel is constant.

    Reference: Laurent et al. (2018), Sec. 3, which leaves the split open.
    """
    generator = torch.Generator().manual_seed(split_seed)
    num_classes = len(class_names)
    _check_sizes(len(train), validation_size, train_size)
    held_out = draw_balanced(train.labels, validation_size, num_classes, generator, size_key="dataset.validation_size")
    is_left = torch.ones(len(train), dtype=torch.bool)
    is_left[held_out] = False
    kept = is_left.nonzero().flatten()
    if train_size is not None and train_size < len(kept):
        chosen = draw_balanced(train.labels[kept], train_size, num_classes, generator, size_key="dataset.train_size")
        kept = kept[chosen]
    training_images = train.select(kept)
    mean, std = channel_statistics(training_images.images)
    return Splits(training_images, train.select(held_out), test, num_classes, list(class_names), mean, std)


def draw_balanced(labels: Tensor, size: int, num_classes: int, generator: torch.Generator, *, size_key: str) -> Tensor:
    """Draw equally many images of every class, without replacement.

    Where ``size`` is not a multiple of ``num_classes``, the remaining images come one each from the classes
    with the most images (lower label first among equals), so that the draw fails only where balance is
    impossible.

    Args:
        labels: Class of every image, ``[num_images]``, int64.
        size: Number of images to draw.
        num_classes: Number of classes.
        generator: Source of randomness; advanced by the same amount whatever ``size`` is, so that draws nest.
        size_key: The user's name for ``size``, for the message.

    Returns:
        Positions of the drawn images in ascending order, ``[size]``, int64.

    Raises:
        DataError: If a class has fewer images than its share.
    """
    counts = torch.bincount(labels, minlength=num_classes)
    quotas = torch.full_like(counts, size // num_classes)
    quotas[counts.argsort(descending=True, stable=True)[: size % num_classes]] += 1
    drawn = []
    for label, (quota, count) in enumerate(zip(quotas.tolist(), counts.tolist(), strict=True)):
        if quota > count:
            raise DataError(
                f"{size_key}={size} takes {quota} images of class {label}, of which only {count} are "
                f"available; lower {size_key}."
            )
        members = (labels == label).nonzero().flatten()
        drawn.append(members[torch.randperm(count, generator=generator)[:quota]])
    return torch.cat(drawn).sort().values


def channel_statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of every channel over all images and pixels.

    Computed in float64 from the 256-bin histogram of each channel: exact, and without a floating-point copy
    of the images, which would take 600 MB for CIFAR-10.

    Args:
        images: Grey levels, ``[num_images, channels, height, width]``, uint8.

    Returns:
        Mean and (population) standard deviation, each ``[channels]``, float32, in units of [0, 1] grey
        levels.

    Raises:
        DataError: If a channel is constant, so that it cannot be normalised.
    """
    levels = torch.arange(256, dtype=torch.float64) / 255
    histograms = [torch.bincount(channel.flatten(), minlength=256) for channel in images.unbind(1)]
    weights = torch.stack(histograms).double() / histograms[0].sum()  # [channels, 256]
    mean = weights @ levels
    variance = (weights * (levels - mean[:, None]) ** 2).sum(1)
    if (variance == 0).any():
        constant = (variance == 0).nonzero().flatten().tolist()
        raise DataError(
            f"Colour channels {constant} are constant over the {len(images)} training images and cannot be "
            "normalised; raise dataset.train_size or use another data set."
        )
    return mean.float(), variance.sqrt().float()


def _check_sizes(available: int, validation_size: int, train_size: int | None) -> None:
    """Refuse sizes that no split of ``available`` training images can have."""
    if not 1 <= validation_size < available:
        raise DataError(
            f"dataset.validation_size must be between 1 and {available - 1} (of {available} training "
            f"images), got {validation_size}."
        )
    left = available - validation_size
    if train_size is not None and not 1 <= train_size <= left:
        raise DataError(
            f"dataset.train_size must be between 1 and {left} ({available} training images less "
            f"dataset.validation_size={validation_size}), got {train_size}."
        )
