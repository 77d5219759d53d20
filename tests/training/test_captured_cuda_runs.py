"""Runs on a CUDA device with captured steps: the bits of eager ones, also after a kill, and no wait for the device."""

import os

import pytest
import torch
from identical import assert_identical
from stops import stop_after
from tiny_runs import TINY, directory_of, metrics_without_times

from kfac_sua.compose import compose_config
from kfac_sua.config import Config
from kfac_sua.preconditioner import CapturedStep
from kfac_sua.preconditioner.captured.step import WARM_UP_STEPS
from kfac_sua.runs.metrics import read_records
from kfac_sua.runs.run_info import read_run_info
from kfac_sua.training.build import build_training
from kfac_sua.training.checkpoint import load_checkpoint
from kfac_sua.training.loop import run
from kfac_sua.training.signals import Interrupted

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

PERIOD = "preconditioner.inverse_period=20"
SETTINGS = {
    "baseline": ("preconditioner=baseline",),
    "kfac": ("preconditioner=kfac", PERIOD),
    "sua": ("preconditioner=sua", PERIOD, "dataset.augmentation=flip_crop"),
    "grouped": ("preconditioner=grouped", "preconditioner.group_size=8", PERIOD),
    "sua_grouped": ("preconditioner=sua_grouped", "preconditioner.group_size=8", PERIOD, "schedule=cosine"),
    "kfac weight": ("preconditioner=kfac", "preconditioner.application=weight", PERIOD, "preconditioner.kl_clip=1e-3"),
    "bfloat16": ("preconditioner=sua", "precision=bfloat16", PERIOD),
    "float32": ("preconditioner=sua", "precision=float32", PERIOD),
    "adaptive": ("preconditioner=sua", "preconditioner.adaptive_damping=10", PERIOD),
    "adamw": ("preconditioner=baseline", "optimizer=adamw", "schedule=cosine"),
    "muon": ("preconditioner=baseline", "optimizer=muon"),
}


@pytest.fixture(autouse=True, scope="module")
def cublas():
    """Deterministic runs need this before the first use of the GPU; `make test-gpu` sets it for its process."""
    if os.environ.get("CUBLAS_WORKSPACE_CONFIG") not in (":4096:8", ":16:8"):
        pytest.skip("needs CUBLAS_WORKSPACE_CONFIG=:4096:8 in the environment, as `make test-gpu` sets it")


def config_of(tmp_path, *overrides: str) -> Config:
    """Return a run of 100 steps an epoch on the GPU."""
    base = [text for text in TINY if not text.startswith(("device", "dataset.train_size"))]
    small = ("dataset.train_size=1000", "batch_size=10", "epochs=2", "deterministic=true", "device=cuda")
    return compose_config([*base, *small, f"output_dir={tmp_path}", *overrides])


def final_state(config: Config) -> dict:
    """Return all but the seconds of the checkpoint that a run left."""
    directory = directory_of(config)
    state = vars(
        load_checkpoint(directory.checkpoint, fingerprint=directory.fingerprint, seed=0, device=torch.device("cpu"))
    )
    del state["times"], state["records_digest"]
    return state


@pytest.mark.parametrize("setting", SETTINGS)
def test_captured_runs_have_the_bits_of_eager_ones(tmp_path, monkeypatch, setting):
    """200 steps: eager, captured, and captured but stopped three times on the way."""
    eager, straight, stopped = (
        config_of(tmp_path / name, *SETTINGS[setting], f"capture={capture}")
        for name, capture in (("eager", "false"), ("straight", "true"), ("stopped", "true"))
    )
    run(eager)
    run(straight)
    for steps in (33, 41, 50):
        with monkeypatch.context() as context:
            stop_after(context, steps)
            with pytest.raises(Interrupted):
                run(stopped)
    assert run(stopped).status == "finished"
    assert read_records(directory_of(straight).metrics)[-1].captured_s > 0
    assert read_records(directory_of(eager).metrics)[-1].captured_s == 0
    for config in (straight, stopped):
        assert metrics_without_times(config) == metrics_without_times(eager)
        assert_identical(final_state(config), final_state(eager))


@pytest.mark.parametrize("setting", SETTINGS)
def test_replays_of_the_command_never_wait(tmp_path, setting):
    """PyTorch raises where the host would wait for the GPU, from one replay to the next."""
    training = build_training(config_of(tmp_path, *SETTINGS[setting], "capture=true"), torch.device("cuda"))
    training.begin_epoch()
    step = training.take_step
    assert isinstance(step, CapturedStep)
    try:
        for index in range(60):
            num_replays = step.num_replays
            is_watched = not training.statistics_due and step.num_captures > 0 and index % 10
            torch.cuda.set_sync_debug_mode("error" if is_watched else "default")
            step()
            torch.cuda.set_sync_debug_mode("default")
            training.batch += 1
            assert not is_watched or step.num_replays == num_replays + 1 or setting == "adaptive"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert step.num_replays >= 60 - 6 - 4 * WARM_UP_STEPS


def test_auto_captures_in_tf32(tmp_path):
    """The defaults of the command on a GPU that has TF32."""
    if not torch.cuda.is_tf32_supported():
        pytest.skip("needs a CUDA device that has TF32")
    config = config_of(tmp_path, *SETTINGS["sua"], "epochs=1")
    run(config)
    assert read_run_info(directory_of(config).info).config["precision"] == "tf32"
    assert read_records(directory_of(config).metrics)[-1].captured_s > 0


def test_divergence_ends_a_captured_run(tmp_path):
    """A learning rate that is far too large, with and without a preconditioner."""
    for setting in ("baseline", "kfac"):
        config = config_of(tmp_path, *SETTINGS[setting], "optimizer.lr=1e18", "capture=true")
        assert run(config).status == "diverged"
