"""The one place where global random states are set."""

import random

import numpy as np
import torch


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and PyTorch on all devices, once per run and before the model is made.

    Only the initialisation of the model draws from these: the order of the images and their augmentation come from
    generators of their own (``data.batches.epoch_generator``), sampled labels from the preconditioner's, so that a
    resumed run needs no saved random state.

    Args:
        seed: Seed of the run, from 0 to 2³² - 1.
    """
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  # for libraries that draw from NumPy's global state
    torch.manual_seed(seed)
