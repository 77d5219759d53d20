"""Data sets as uint8 tensors, their splits, and device-resident mini-batches."""

from kfac_sua.data.archive import archive_path, fetch_cifar, is_at_hand, load_archive, provide_archive
from kfac_sua.data.batches import BatchLoader, epoch_generator
from kfac_sua.data.digits import load_digits
from kfac_sua.data.splits import DataError, ImageSet, Splits, channel_statistics, make_splits

__all__ = [
    "BatchLoader",
    "DataError",
    "ImageSet",
    "Splits",
    "archive_path",
    "channel_statistics",
    "epoch_generator",
    "fetch_cifar",
    "is_at_hand",
    "load_archive",
    "load_digits",
    "make_splits",
    "provide_archive",
]
