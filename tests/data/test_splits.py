"""Splits against counting, and channel statistics against NumPy in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kfac_sua.data import DataError, ImageSet, Splits, channel_statistics, make_splits
from kfac_sua.data.splits import draw_balanced

CLASS_NAMES = ["cat", "dog", "owl"]


def numbered_images(labels: list[int]) -> ImageSet:
    """Return images that carry their own position in their first two pixels, for telling them apart."""
    images = torch.randint(
        0, 256, (len(labels), 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(5)
    )
    positions = torch.arange(len(labels))
    images[:, 0, 0, 0] = (positions // 256).to(torch.uint8)
    images[:, 0, 0, 1] = (positions % 256).to(torch.uint8)
    return ImageSet(images, torch.tensor(labels))


def positions_of(images: ImageSet) -> list[int]:
    """Read back the positions that ``numbered_images`` wrote."""
    return (images.images[:, 0, 0, 0].long() * 256 + images.images[:, 0, 0, 1].long()).tolist()


TRAIN = numbered_images([0, 1, 2] * 100)
TEST = numbered_images([2, 1, 0] * 5)


def split(validation_size: int = 30, train_size: int | None = None, split_seed: int = 0) -> Splits:
    """Split the 300 images, 100 of each class."""
    return make_splits(
        TRAIN,
        TEST,
        CLASS_NAMES,
        validation_size=validation_size,
        train_size=train_size,
        split_seed=split_seed,
    )


def test_split_is_a_partition_with_equal_class_counts() -> None:
    """Every training image lies in exactly one part, each class equally often, labels stay with images."""
    splits = split(validation_size=30)
    assert splits.val.labels.bincount().tolist() == [10, 10, 10]
    assert splits.train.labels.bincount().tolist() == [90, 90, 90]
    assert sorted(positions_of(splits.train) + positions_of(splits.val)) == list(range(300))
    for part in (splits.train, splits.val):
        positions = positions_of(part)
        assert torch.equal(part.images, TRAIN.images[positions])
        assert torch.equal(part.labels, TRAIN.labels[positions])
    assert splits.test is TEST
    assert (splits.num_classes, splits.class_names) == (3, CLASS_NAMES)


def test_train_size_is_a_balanced_subset_of_the_rest() -> None:
    """The subset has the asked size, equal class counts, and no held-out image."""
    splits = split(validation_size=30, train_size=60)
    assert splits.train.labels.bincount().tolist() == [20, 20, 20]
    assert not set(positions_of(splits.train)) & set(positions_of(splits.val))


def test_train_size_of_everything_left_equals_none() -> None:
    """Asking for exactly what is left must work, even where it is not balanced."""
    unbalanced = numbered_images([0] * 50 + [1] * 50 + [2] * 10)
    parts = [
        make_splits(unbalanced, TEST, CLASS_NAMES, validation_size=6, train_size=train_size, split_seed=0)
        for train_size in (104, None)
    ]
    assert parts[0].train.labels.bincount().tolist() == [48, 48, 8]
    assert positions_of(parts[0].train) == positions_of(parts[1].train)


@pytest.mark.parametrize(("size", "counts"), [(1, [1, 0, 0]), (31, [11, 10, 10]), (32, [11, 11, 10])])
def test_indivisible_sizes_differ_by_at_most_one(size: int, counts: list[int]) -> None:
    """What is left over goes to the lower labels where all classes are equally large."""
    assert split(validation_size=size).val.labels.bincount(minlength=3).tolist() == counts


def test_splits_depend_on_the_split_seed_alone() -> None:
    """The same seed gives the same images whatever the global generator did; another seed gives others."""
    first = split(split_seed=1, train_size=60)
    torch.rand(7)
    before = torch.get_rng_state()
    again, other = split(split_seed=1, train_size=60), split(split_seed=2, train_size=60)
    assert torch.equal(torch.get_rng_state(), before)
    for part in ("train", "val"):
        assert positions_of(getattr(first, part)) == positions_of(getattr(again, part))
        assert positions_of(getattr(first, part)) != positions_of(getattr(other, part))


def test_draws_are_nested() -> None:
    """The held-out images do not depend on train_size, and a smaller training set lies within a larger one."""
    small, large = split(train_size=40), split(train_size=61)
    assert positions_of(small.val) == positions_of(large.val) == positions_of(split().val)
    assert set(positions_of(small.train)) < set(positions_of(large.train))


def test_held_out_images_are_not_the_first_ones() -> None:
    """The draw is random within a class: a file sorted by difficulty must not bias the split."""
    positions = positions_of(split(validation_size=60).val)
    assert max(positions) > 200
    assert len({position % 7 for position in positions}) == 7


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((0, None), r"^dataset.validation_size must be between 1 and 299 \(of 300 training images\), got 0\.$"),
        ((300, None), r"^dataset.validation_size must be between 1 and 299 .*, got 300\.$"),
        (
            (30, 271),
            r"^dataset.train_size must be between 1 and 270 \(300 training images less "
            r"dataset.validation_size=30\), got 271\.$",
        ),
        ((30, 0), r"^dataset.train_size must be between 1 and 270 .*, got 0\.$"),
    ],
)
def test_impossible_sizes_name_the_key_and_the_limits(sizes: tuple[int, int | None], message: str) -> None:
    """Sizes beyond what there is are refused in the user's own words."""
    with pytest.raises(DataError, match=message):
        split(*sizes)


def test_class_with_too_few_images_is_named() -> None:
    """Enough images in all but too few of one class cannot be balanced."""
    unbalanced = numbered_images([0] * 50 + [1] * 50 + [2] * 3)
    with pytest.raises(
        DataError,
        match=r"^dataset.validation_size=30 takes 10 images of class 2, of which only 3 are available; "
        r"lower dataset.validation_size\.$",
    ):
        make_splits(unbalanced, TEST, CLASS_NAMES, validation_size=30, train_size=None, split_seed=0)


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_balanced_draw_succeeds_exactly_where_balance_is_possible(data: st.DataObject) -> None:
    """Counts differ by at most one; the draw fails only if some class cannot give the lower share."""
    counts = data.draw(st.lists(st.integers(0, 9), min_size=2, max_size=6).filter(sum))
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(3))]
    size = data.draw(st.integers(1, len(labels)))
    generator = torch.Generator().manual_seed(0)
    share, rest = divmod(size, len(counts))
    possible = min(counts) >= share and sum(count > share for count in counts) >= rest
    if not possible:
        with pytest.raises(DataError, match=r"^dataset\.size="):
            draw_balanced(labels, size, len(counts), generator, size_key="dataset.size")
        return
    drawn = draw_balanced(labels, size, len(counts), generator, size_key="dataset.size")
    assert len(set(drawn.tolist())) == size
    assert drawn.tolist() == sorted(drawn.tolist())
    drawn_counts = labels[drawn].bincount(minlength=len(counts))
    assert drawn_counts.max() - drawn_counts.min() <= 1


def numpy_statistics(images: torch.Tensor) -> tuple[Any, Any]:
    """Return channel mean and standard deviation in [0, 1] units, in float64."""
    scaled = images.numpy().astype(np.float64) / 255
    return scaled.mean(axis=(0, 2, 3)), scaled.std(axis=(0, 2, 3))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_channel_statistics_equal_numpy_in_float64(memory_format: torch.memory_format) -> None:
    """Mean and standard deviation agree to float32 rounding, for channels of very different spread."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (17, 3, 32, 32), dtype=torch.uint8, generator=generator)
    images[:, 1] = 250 + images[:, 1] % 3  # nearly constant and bright: cancellation would show
    images[:, 2] //= 4
    mean, std = channel_statistics(images.contiguous(memory_format=memory_format))
    expected_mean, expected_std = numpy_statistics(images)
    assert mean.dtype == std.dtype == torch.float32
    np.testing.assert_allclose(mean.numpy(), expected_mean, rtol=2e-7)
    np.testing.assert_allclose(std.numpy(), expected_std, rtol=2e-7)


def test_statistics_come_from_the_images_trained_on() -> None:
    """Neither held-out images nor those beyond train_size may enter the normalisation."""
    splits = split(validation_size=150, train_size=15)
    expected_mean, expected_std = numpy_statistics(splits.train.images)
    np.testing.assert_allclose(splits.mean.numpy(), expected_mean, rtol=2e-7)
    np.testing.assert_allclose(splits.std.numpy(), expected_std, rtol=2e-7)
    assert not np.allclose(splits.mean.numpy(), numpy_statistics(TRAIN.images)[0], rtol=1e-5)


def test_constant_channel_is_refused() -> None:
    """A channel without variance cannot be normalised, which must not surface as NaN inputs."""
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    images[:, 1] = 255
    with pytest.raises(DataError, match=r"^Colour channels \[1\] are constant over the 4 training images"):
        channel_statistics(images)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (torch.zeros(4, 3, 32, 32), torch.zeros(4).long(), r"images must be uint8 .* got torch.float32 \[4, 3"),
        (torch.zeros(4, 3072).byte(), torch.zeros(4).long(), r"images must be uint8 .* got torch.uint8 \[4, 3072"),
        (torch.zeros(4, 3, 32, 32).byte(), torch.zeros(3).long(), r"labels must be int64 \[4\], got .* \[3\]"),
        (torch.zeros(4, 3, 32, 32).byte(), torch.zeros(4).int(), r"labels must be int64 \[4\], got torch.int32"),
    ],
)
def test_image_set_refuses_other_tensors(images: torch.Tensor, labels: torch.Tensor, message: str) -> None:
    """Mistakes in a caller's code show where the set is made, not in the middle of training."""
    with pytest.raises(ValueError, match=message):
        ImageSet(images, labels)


def test_select_keeps_order_and_copies() -> None:
    """A selection follows its indices and does not share memory with the set."""
    chosen = TRAIN.select(torch.tensor([7, 3]))
    assert positions_of(chosen) == [7, 3]
    assert len(chosen) == 2
    chosen.images.zero_()
    assert positions_of(TRAIN)[7] == 7
