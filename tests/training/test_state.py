"""Where randomness comes from when a run is set up."""

import random

import numpy as np
import pytest
import torch
from identical import assert_identical
from tiny_runs import tiny_config

from kfac_sua.training.build import build_training
from kfac_sua.training.determinism import seed_everything
from kfac_sua.training.state import load_optimizer_state


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
    first = build_training(tiny_config(tmp_path, "preconditioner=baseline"), cpu).model.state_dict()
    torch.rand(10)
    second = build_training(tiny_config(tmp_path, "preconditioner=grouped"), cpu).model.state_dict()
    other = build_training(tiny_config(tmp_path, "preconditioner=baseline", "seed=1"), cpu).model.state_dict()
    assert_identical(dict(first), dict(second))
    assert not torch.equal(first["classifier.weight"], other["classifier.weight"])


def test_run_seed_does_not_move_the_split(tmp_path):
    """The held-out images belong to the data set's split_seed."""
    cpu = torch.device("cpu")
    labels = [build_training(tiny_config(tmp_path, f"seed={seed}"), cpu).splits.val.labels for seed in (0, 1)]
    assert torch.equal(*labels)


def test_loading_keeps_the_implementation_but_not_the_learning_rate(tmp_path):
    """A state saved by a fused optimizer is gone on from by the plain loop, with the saved rate and momentum."""
    training = build_training(tiny_config(tmp_path, "preconditioner=baseline"), torch.device("cpu"))
    parameters = list(training.model.parameters())
    saved_by = torch.optim.SGD(parameters, lr=0.5, momentum=0.9, fused=True)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    saved_by.step()
    load_optimizer_state(training.optimizer, saved_by.state_dict())
    (group,) = training.optimizer.param_groups
    assert (group["fused"], group["foreach"], group["lr"]) == (False, None, 0.5)
    momenta = [training.optimizer.state[parameter]["momentum_buffer"] for parameter in parameters]
    assert all(torch.equal(momentum, torch.ones_like(momentum)) for momentum in momenta)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_steps_are_fused_also_after_a_resume(tmp_path):
    """SGD takes one kernel on CUDA, whatever an older checkpoint says, and agrees with the plain loop to rounding."""
    config = tiny_config(tmp_path, "preconditioner=baseline", "device=cuda", "optimizer.lr=0.1")
    training = build_training(config, torch.device("cuda"))
    parameters = list(training.model.parameters())
    copies = [parameter.detach().clone() for parameter in parameters]
    plain = torch.optim.SGD(copies, lr=0.1, momentum=0.9, foreach=False)
    load_optimizer_state(training.optimizer, plain.state_dict())
    assert training.optimizer.param_groups[0]["fused"] is True
    for _ in range(3):
        for parameter, copy in zip(parameters, copies, strict=True):
            parameter.grad = torch.randn_like(parameter)
            copy.grad = parameter.grad.clone()
        training.optimizer.step()
        plain.step()
    for parameter, copy in zip(parameters, copies, strict=True):
        torch.testing.assert_close(parameter.detach(), copy, rtol=1e-5, atol=1e-6)
