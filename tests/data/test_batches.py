"""Mini-batches against slow, obvious versions in NumPy that work on one image at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from kfac_sua.data import BatchLoader, DataError, ImageSet, channel_statistics, epoch_generator
from kfac_sua.data.batches import draw_flip_crop, flip_crop

LAYOUTS = [torch.contiguous_format, torch.channels_last]
NUM_IMAGES = 23
IMAGES = ImageSet(
    torch.randint(0, 256, (NUM_IMAGES, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)),
    torch.arange(NUM_IMAGES),  # the label tells which image it is
)
MEAN, STD = channel_statistics(IMAGES.images)


def loader(**changes: Any) -> BatchLoader:
    """Return a loader of 23 images in batches of 5."""
    return BatchLoader(IMAGES, MEAN, STD, **{"batch_size": 5, **changes})


def normalised(position: int) -> np.ndarray:
    """Normalise one image in float64."""
    scaled = IMAGES.images[position].numpy().astype(np.float64) / 255
    return (scaled - MEAN.double().numpy()[:, None, None]) / STD.double().numpy()[:, None, None]


def flipped_crop(image: np.ndarray, flip: bool, top: int, left: int) -> np.ndarray:
    """Paste one image into the middle of a 40×40 canvas of zeros, cut 32×32 from it, and mirror the cut."""
    canvas = np.zeros((3, 40, 40))
    canvas[:, 4:36, 4:36] = image
    crop = canvas[:, top : top + 32, left : left + 32]
    return crop[:, :, ::-1] if flip else crop


@pytest.mark.parametrize("memory_format", LAYOUTS)
def test_normalisation_equals_numpy(memory_format: torch.memory_format) -> None:
    """Evaluation batches hold (grey / 255 - mean) / std of each channel, float32, in the asked layout."""
    for inputs, labels in loader(memory_format=memory_format).sequential(5):
        assert inputs.dtype == torch.float32
        assert inputs.is_contiguous(memory_format=memory_format)
        expected = np.stack([normalised(position) for position in labels.tolist()])
        np.testing.assert_allclose(inputs.numpy(), expected, rtol=1e-5, atol=1e-6)


def test_whole_set_has_zero_mean_and_unit_variance() -> None:
    """Over the images that gave the statistics, each channel is standardised."""
    ((inputs, _),) = loader().sequential(NUM_IMAGES)
    torch.testing.assert_close(inputs.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(inputs.var((0, 2, 3), unbiased=False), torch.ones(3), atol=1e-5, rtol=0)


@pytest.mark.parametrize("memory_format", LAYOUTS)
def test_flip_crop_equals_one_image_at_a_time(memory_format: torch.memory_format) -> None:
    """For every crop position, flipped and not, the single gather equals pasting, cutting and mirroring."""
    generator = torch.Generator().manual_seed(2)
    draws = torch.cartesian_prod(torch.arange(9), torch.arange(9), torch.arange(2))  # [162, 3]
    offsets, flips = draws[:, :2], draws[:, 2].bool()
    images = torch.randn(len(offsets), 3, 32, 32, generator=generator)
    crops = flip_crop(images.contiguous(memory_format=memory_format), flips, offsets)
    assert crops.shape == images.shape
    for crop, image, flip, (top, left) in zip(crops, images, flips.tolist(), offsets.tolist(), strict=True):
        np.testing.assert_array_equal(crop.numpy(), flipped_crop(image.numpy(), flip, top, left))


def test_central_crop_without_flip_changes_nothing() -> None:
    """Offset 4 with 4 pixels of padding is the image itself."""
    images = torch.randn(2, 3, 32, 32)
    crops = flip_crop(images, torch.tensor([False, False]), torch.full((2, 2), 4))
    assert torch.equal(crops, images)


def test_draws_are_uniform() -> None:
    """Half the images are flipped, and each of the 81 crop positions is equally likely (5 sigma)."""
    flips, offsets = draw_flip_crop(81_000, epoch_generator(0, 0, "test"))
    assert abs(flips.double().mean().item() - 0.5) < 5 * (0.25 / 81_000) ** 0.5
    counts = torch.bincount(offsets[:, 0] * 9 + offsets[:, 1], minlength=81)
    assert len(counts) == 81
    assert (counts - 1000).abs().max() < 5 * 1000**0.5
    flipped_counts = torch.bincount(offsets[flips][:, 0], minlength=9)
    assert (flipped_counts - 4500).abs().max() < 5 * 4500**0.5


@pytest.mark.parametrize("memory_format", LAYOUTS)
def test_augmented_epoch_equals_the_oracle_with_the_same_draws(memory_format: torch.memory_format) -> None:
    """An epoch is: permute, normalise, paste, cut, mirror, with draws fixed by seed and epoch."""
    order = torch.randperm(NUM_IMAGES, generator=epoch_generator(3, 1, "order")).tolist()
    flips, offsets = draw_flip_crop(NUM_IMAGES, epoch_generator(3, 1, "augmentation"))
    batches = list(loader(augmentation="flip_crop", memory_format=memory_format).epoch(3, 1))
    assert len(batches) == 4
    assert flips[:20].any()
    assert not flips[:20].all()
    for number, (inputs, labels) in enumerate(batches):
        assert inputs.is_contiguous(memory_format=memory_format)
        assert labels.tolist() == order[5 * number : 5 * number + 5]
        for index, position in enumerate(labels.tolist()):
            draw = 5 * number + index
            expected = flipped_crop(normalised(position), bool(flips[draw]), *offsets[draw].tolist())
            np.testing.assert_allclose(inputs[index].numpy(), expected, rtol=1e-5, atol=1e-6)


def test_epoch_without_augmentation_serves_normalised_images() -> None:
    """Shuffling must keep images with their labels."""
    for inputs, labels in loader().epoch(0, 0):
        expected = np.stack([normalised(position) for position in labels.tolist()])
        np.testing.assert_allclose(inputs.numpy(), expected, rtol=1e-5, atol=1e-6)


def labels_of(batches: Any) -> list[int]:
    """Return the labels of all batches in one list."""
    return [label for _, labels in batches for label in labels.tolist()]


def test_epoch_is_shuffled_and_drops_the_incomplete_batch() -> None:
    """23 images in batches of 5 are 4 full batches of 20 different images, in no sorted order."""
    batches = loader()
    served = [labels.tolist() for _, labels in batches.epoch(0, 0)]
    assert [len(labels) for labels in served] == [5] * 4
    assert len(batches) == 4
    flat = labels_of(batches.epoch(0, 0))
    assert len(set(flat)) == 20
    assert flat != sorted(flat)


def test_every_image_has_its_turn() -> None:
    """The dropped images differ between epochs."""
    dropped = [set(range(NUM_IMAGES)) - set(labels_of(loader().epoch(0, epoch))) for epoch in range(6)]
    assert all(len(positions) == 3 for positions in dropped)
    assert set.intersection(*dropped) == set()
    assert len(set.union(*dropped)) > 6


def test_epoch_depends_on_seed_and_epoch_alone() -> None:
    """A resumed run gets the batches it would have had: no state is carried from epoch to epoch."""
    augmented = loader(augmentation="flip_crop")
    first = [(inputs.clone(), labels) for inputs, labels in augmented.epoch(0, 4)]
    list(augmented.epoch(0, 3))
    torch.rand(11)
    before = torch.get_rng_state()
    again = list(loader(augmentation="flip_crop").epoch(0, 4))
    assert torch.equal(torch.get_rng_state(), before)
    for (inputs, labels), (same_inputs, same_labels) in zip(first, again, strict=True):
        assert torch.equal(inputs, same_inputs)
        assert torch.equal(labels, same_labels)
    orders = {tuple(labels_of(augmented.epoch(seed, epoch))) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


def test_augmentation_does_not_depend_on_the_batch_size() -> None:
    """Draws belong to an image's turn within the epoch, so batch size leaves the images as they are."""
    small = torch.cat([inputs for inputs, _ in loader(augmentation="flip_crop").epoch(0, 0)])
    large = torch.cat([inputs for inputs, _ in loader(augmentation="flip_crop", batch_size=10).epoch(0, 0)])
    assert torch.equal(small, large)


@pytest.mark.parametrize("batch_size", [1, 5, 23, 100])
def test_sequential_serves_everything_in_order(batch_size: int) -> None:
    """Evaluation sees each image once, unaugmented, with the last batch as small as it must be."""
    batches = list(loader(augmentation="flip_crop").sequential(batch_size))
    assert labels_of(batches) == list(range(NUM_IMAGES))
    assert len(batches) == -(-NUM_IMAGES // batch_size)
    last = batches[-1][0][-1].numpy()
    np.testing.assert_allclose(last, normalised(NUM_IMAGES - 1), rtol=1e-5, atol=1e-6)


def test_loader_for_evaluation_needs_no_batch_size() -> None:
    """A small validation set is served whatever the training batch size is, but not as training batches."""
    evaluation = BatchLoader(IMAGES, MEAN, STD)
    assert labels_of(evaluation.sequential(100)) == list(range(NUM_IMAGES))
    with pytest.raises(ValueError, match="has no batch_size and only serves sequential"):
        next(evaluation.epoch(0, 0))


def test_serving_never_changes_the_stored_images() -> None:
    """Normalisation works in place on a copy, not on the set."""
    before = IMAGES.images.clone()
    batches = loader(augmentation="flip_crop")
    for inputs, _ in list(batches.epoch(0, 0)) + list(batches.sequential(7)):
        inputs.zero_()
    assert torch.equal(IMAGES.images, before)
    torch.testing.assert_close(
        next(iter(batches.sequential(1)))[0][0].double(), torch.from_numpy(normalised(0)), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize(
    ("purpose", "seed", "epoch", "sha256_start"),
    [("order", 0, 0, 0x49458F2F2F8704B2), ("augmentation", 3, 17, 0x80916C811B6A5BF1)],
)
def test_generator_seed_is_pinned(purpose: str, seed: int, epoch: int, sha256_start: int) -> None:
    """The seed is the start of what `printf order/0/0 | sha256sum` prints, on every machine and version."""
    assert epoch_generator(seed, epoch, purpose).initial_seed() == sha256_start


def test_generators_of_neighbours_differ() -> None:
    """No two of purpose, seed and epoch share a stream, not even where seed + epoch are equal."""
    streams = {
        torch.rand(1, generator=epoch_generator(seed, epoch, purpose)).item()
        for purpose in ("order", "augmentation")
        for seed in range(12)
        for epoch in range(12)
    }
    assert len(streams) == 288


@pytest.mark.parametrize("batch_size", [0, -5, 24])
def test_batch_size_out_of_range_names_both_keys(batch_size: int) -> None:
    """More than the set holds would be an epoch without a step."""
    with pytest.raises(
        DataError,
        match=rf"^batch_size must be between 1 and 23, the number of images, got {batch_size}; "
        r"lower batch_size or raise dataset.train_size\.$",
    ):
        loader(batch_size=batch_size)


def test_unknown_augmentation_lists_the_choices() -> None:
    """A typing error must not silently mean no augmentation."""
    with pytest.raises(DataError, match=r"^dataset.augmentation must be one of none, flip_crop, got 'flipcrop'\.$"):
        loader(augmentation="flipcrop")


def test_empty_set_and_empty_batches_are_refused() -> None:
    """Neither may pass as an epoch of nothing."""
    empty = ImageSet(torch.zeros(0, 3, 32, 32, dtype=torch.uint8), torch.zeros(0, dtype=torch.int64))
    with pytest.raises(DataError, match="image set is empty"):
        BatchLoader(empty, MEAN, STD)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        next(loader().sequential(0))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("memory_format", LAYOUTS)
def test_cuda_serves_the_batches_of_the_cpu(memory_format: torch.memory_format) -> None:
    """Random numbers are drawn on the CPU, so the device changes nothing but rounding."""
    changes = {"augmentation": "flip_crop", "memory_format": memory_format}
    on_cpu, on_cuda = loader(**changes).epoch(0, 0), loader(device="cuda", **changes).epoch(0, 0)
    for (inputs, labels), (cuda_inputs, cuda_labels) in zip(on_cpu, on_cuda, strict=True):
        assert cuda_inputs.is_cuda
        assert cuda_labels.is_cuda
        assert cuda_inputs.is_contiguous(memory_format=memory_format)
        torch.testing.assert_close(cuda_inputs.cpu(), inputs)
        assert torch.equal(cuda_labels.cpu(), labels)
