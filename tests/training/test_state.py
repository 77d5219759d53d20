"""Where randomness comes from when a run is set up."""

import random

import numpy as np
import torch
from identical import assert_identical
from tiny_runs import tiny_config

from kfac_sua.training.seeding import seed_everything
from kfac_sua.training.state import Training


def test_seed_everything_repeats_all_three_generators():
    """Python, NumPy and PyTorch draw the same numbers after the same seed."""

    def draw(seed):
        seed_everything(seed)
        from_numpy = np.random.rand()  # noqa: NPY002
        return random.random(), from_numpy, torch.rand(()).item()

    assert draw(7) == draw(7)
    assert all(first != second for first, second in zip(draw(7), draw(8), strict=True))


def test_initialisation_depends_on_the_seed_alone(tmp_path):
    """Two preconditioners start from the same weights, whatever was drawn before; another seed does not."""
    cpu = torch.device("cpu")
    first = Training.start(tiny_config(tmp_path, "preconditioner=baseline"), cpu).model.state_dict()
    torch.rand(10)
    second = Training.start(tiny_config(tmp_path, "preconditioner=grouped"), cpu).model.state_dict()
    other = Training.start(tiny_config(tmp_path, "preconditioner=baseline", "seed=1"), cpu).model.state_dict()
    assert_identical(dict(first), dict(second))
    assert not torch.equal(first["classifier.weight"], other["classifier.weight"])


def test_run_seed_does_not_move_the_split(tmp_path):
    """The held-out images belong to the data set's split_seed."""
    cpu = torch.device("cpu")
    labels = [Training.start(tiny_config(tmp_path, f"seed={seed}"), cpu).splits.val.labels for seed in (0, 1)]
    assert torch.equal(*labels)
