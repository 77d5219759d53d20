"""The data sets that the project knows by name: how many images and classes each of them has."""

from dataclasses import dataclass

IMAGE_SHAPE = (3, 32, 32)
"""Channels, height and width of every image: CIFAR's own, to which digits are resized."""


@dataclass(frozen=True)
class DataSetSize:
    """Images of a data set as it was published, before any are held out or left away, and its classes.

    Attributes:
        train: Training images, those that are held out for selection included.
        test: Test images.
        classes: Number of classes.
    """

    train: int
    test: int
    classes: int


# The numbers of CIFAR are Krizhevsky's (2009). Scikit-learn has 1,797 digits, without a test set of their own.
SIZES = {
    "cifar10": DataSetSize(train=50_000, test=10_000, classes=10),
    "cifar100": DataSetSize(train=50_000, test=10_000, classes=100),
    "digits": DataSetSize(train=1_500, test=297, classes=10),
}
