"""The digits against scikit-learn's arrays and an interpolation written out in NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kfac_sua.data import ImageSet, load_digits


@pytest.fixture(scope="module")
def digits() -> tuple[ImageSet, ImageSet, list[str]]:
    """Load the digits once."""
    return load_digits()


def interpolation_matrix(size: int, resized: int) -> np.ndarray:
    """Return the matrix that resizes one axis linearly between pixel centres, repeating the border."""
    matrix = np.zeros((resized, size))
    for target in range(resized):
        position = min(max((target + 0.5) * size / resized - 0.5, 0.0), size - 1.0)
        lower = min(int(position), size - 2)
        matrix[target, lower] += 1 - (position - lower)
        matrix[target, lower + 1] += position - lower
    return matrix


def as_rows(images: np.ndarray, labels: np.ndarray) -> list[bytes]:
    """Return every image with its label as one sortable row."""
    return sorted(image.tobytes() + bytes([label]) for image, label in zip(images, labels.tolist(), strict=True))


def test_images_are_scikit_learns_interpolated(digits: tuple[ImageSet, ImageSet, list[str]]) -> None:
    """Both splits together hold every digit once, each pixel exactly the rounded interpolation."""
    from sklearn.datasets import load_digits as load_digits_bunch

    bunch = load_digits_bunch()
    matrix = interpolation_matrix(8, 32)
    expected = np.rint(matrix @ (bunch.images * 255 / 16) @ matrix.T).astype(np.uint8)
    train, test, class_names = digits
    images = torch.cat([train.images, test.images])
    labels = torch.cat([train.labels, test.labels])
    assert as_rows(images[:, 0].numpy(), labels.numpy()) == as_rows(expected, bunch.target)
    assert class_names == list("0123456789")


def test_shapes_and_channels(digits: tuple[ImageSet, ImageSet, list[str]]) -> None:
    """The digits have the shape of CIFAR with three equal channels that use the whole range of grey."""
    train, test, _ = digits
    assert train.images.shape == (1500, 3, 32, 32)
    assert test.images.shape == (297, 3, 32, 32)
    for channel in (1, 2):
        assert torch.equal(train.images[:, 0], train.images[:, channel])
    assert (train.images.min(), train.images.max()) == (0, 255)


def test_test_images_are_stratified_and_fixed(digits: tuple[ImageSet, ImageSet, list[str]]) -> None:
    """297 images: 30 of seven classes and 29 of three, the same ones on every call."""
    _, test, _ = digits
    assert sorted(test.labels.bincount().tolist()) == [29] * 3 + [30] * 7
    torch.rand(3)
    _, again, _ = load_digits()
    assert torch.equal(test.images, again.images)
    assert torch.equal(test.labels, again.labels)
