"""A tiny archive with the arrays of CIFAR-10, so that no test needs the real one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

CIFAR10_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


@pytest.fixture
def tiny_arrays() -> dict[str, Any]:
    """Return the five arrays of an archive, with 40 training and 20 test images in 10 classes."""
    generator = np.random.default_rng(0)
    return {
        "train_images": generator.integers(0, 256, (40, 32, 32, 3), dtype=np.uint8),
        "train_labels": np.repeat(np.arange(10, dtype=np.uint8), 4),
        "test_images": generator.integers(0, 256, (20, 32, 32, 3), dtype=np.uint8),
        "test_labels": np.tile(np.arange(10, dtype=np.uint8), 2),
        "classes": np.array(CIFAR10_CLASSES),
    }
