"""Runs whose network computes in bfloat16."""

import math

import pytest
import torch
from tiny_runs import TINY_PERIOD, directory_of, metrics_without_times, tiny_config

from kfac_sua.config import Precision
from kfac_sua.models import TinyConvNet
from kfac_sua.runs.record import read_run_info
from kfac_sua.training.checkpoint import load_checkpoint
from kfac_sua.training.loop import run
from kfac_sua.training.precision import compute_logits


@pytest.mark.parametrize(
    "setting",
    [
        ("preconditioner=sua", TINY_PERIOD),
        ("preconditioner=kfac", TINY_PERIOD, "preconditioner.fisher_type=mc"),
        ("preconditioner=baseline",),
    ],
    ids=["sua", "kfac-mc", "baseline"],
)
def test_a_run_in_bfloat16_learns_what_one_in_float32_does(tmp_path, setting):
    """Its losses are close to float32's but not the same, and everything that it keeps is in float32."""
    half, full = (
        tiny_config(tmp_path, *setting, "epochs=3", f"precision={precision}") for precision in ("bfloat16", "float32")
    )
    assert directory_of(half).path != directory_of(full).path
    for config in (half, full):
        assert run(config).status == "finished"
    rows = [metrics_without_times(config)[-1] for config in (half, full)]
    assert rows[0]["train_loss"] != rows[1]["train_loss"]
    assert math.isclose(rows[0]["train_loss"], rows[1]["train_loss"], rel_tol=0.03)
    directory = directory_of(half)
    assert read_run_info(directory.info).config["precision"] == "bfloat16"
    checkpoint = load_checkpoint(
        directory.checkpoint, fingerprint=directory.fingerprint, seed=0, device=torch.device("cpu")
    )
    for state in (checkpoint.model, checkpoint.optimizer, checkpoint.preconditioner):
        assert {tensor.dtype for tensor in tensors(state)} <= {torch.float32, torch.int64}


def test_the_default_precision_keeps_the_directories_of_older_runs(tmp_path):
    """A run of before there was this setting is found again."""
    assert directory_of(tiny_config(tmp_path)) == directory_of(tiny_config(tmp_path, "precision=float32"))


def test_logits_are_in_the_precision_of_losses():
    """Rounded to bfloat16 on the way, but returned in that of the images."""
    torch.manual_seed(0)
    model, images = TinyConvNet(10), torch.randn(4, 3, 32, 32)
    half, full = (compute_logits(model, images, precision) for precision in (Precision.bfloat16, Precision.float32))
    assert half.dtype == full.dtype == torch.float32
    torch.testing.assert_close(half, full, rtol=0.1, atol=0.05)
    assert not torch.equal(half, full)
    assert torch.equal(half, half.bfloat16().float())


def tensors(state):
    """Yield every tensor in nested dictionaries and lists."""
    if isinstance(state, torch.Tensor):
        yield state
    elif isinstance(state, dict):
        yield from (one for value in state.values() for one in tensors(value))
    elif isinstance(state, list | tuple):
        yield from (one for value in state for one in tensors(value))
