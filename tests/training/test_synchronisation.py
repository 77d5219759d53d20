"""Plain steps, 49 of 50, queue work on the device and never wait for it: nothing in them reads a tensor's value."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from thinned import one_in
from tiny_runs import tiny_config
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from unseen_reads import refuse_unseen_reads

from kfac_sua.bench.operations import waits_for_device
from kfac_sua.config import ProgressStyle
from kfac_sua.training import loop
from kfac_sua.training.build import build_training
from kfac_sua.training.evaluate import ErrorCounter
from kfac_sua.training.progress import Progress
from kfac_sua.training.state import Training

PERIOD = "preconditioner.inverse_period=4"
REDUCE = "preconditioner.weight_sharing=reduce"
SETTINGS = {
    "baseline": ("preconditioner=baseline",),
    "kfac": ("preconditioner=kfac", PERIOD),
    "sua": ("preconditioner=sua", PERIOD),
    "grouped": ("preconditioner=grouped", "preconditioner.group_size=8", PERIOD),
    "sua_grouped": ("preconditioner=sua_grouped", "preconditioner.group_size=8", PERIOD),
    "weight": ("preconditioner=kfac", "preconditioner.application=weight", PERIOD),
    "factored_pi": ("preconditioner=kfac", "preconditioner.damping_rule=factored_pi", PERIOD),
    "exact damping": ("preconditioner=sua", "preconditioner.damping_rule=exact", PERIOD),
    "reduce": ("preconditioner=kfac", REDUCE, PERIOD),
    "mc": ("preconditioner=sua", "preconditioner.fisher_type=mc", PERIOD),
    "exact Fisher": ("preconditioner=sua", "preconditioner.fisher_type=exact", PERIOD),
    "cholesky": ("preconditioner=kfac", "preconditioner.inverse_method=cholesky", PERIOD),
    # One row per example: under expand, one per location would make the refreshes take a minute.
    "low_rank": ("preconditioner=kfac", "preconditioner.inverse_method=low_rank", REDUCE, PERIOD),
    "KL clip": (
        "preconditioner=kfac",
        "preconditioner.application=weight",
        "preconditioner.kl_clip=1e-9",
        PERIOD,
    ),
    "adaptive damping": ("preconditioner=kfac", "preconditioner.adaptive_damping=4", PERIOD),  # waits where it adapts
    "average": ("preconditioner=kfac", "preconditioner.ema_decay=0.5", "preconditioner.factor_period=2", PERIOD),
    "augmentation": ("preconditioner=sua", "dataset.augmentation=flip_crop", PERIOD),
    "Nesterov": ("preconditioner=sua", "optimizer.nesterov=true", "optimizer.weight_decay=1e-3", PERIOD),
    "losses": ("preconditioner=baseline", "log_interval=1"),
    "bar": ("preconditioner=sua", "progress=bar", PERIOD),
}
# On the CPU, where it costs nothing, AdamW keeps its count of steps as a tensor and reads it.
CUDA_SETTINGS = SETTINGS | {
    "adamw": ("preconditioner=baseline", "optimizer=adamw"),
    "muon": ("preconditioner=baseline", "optimizer=muon"),
}


class ForbiddenWaits(TorchDispatchMode):
    """While ``is_on``, refuses every operation for which a GPU's host would have to wait."""

    is_on = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Carry an operation out, or say which one waits."""
        name = func._schema.name.removeprefix("aten::")
        if self.is_on and waits_for_device(name, args):
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))


class Steps(Progress):
    """Progress that says before each step of one epoch whether it is a plain one, and counts these.

    Args:
        training: The state that is trained.
        forbid: Called with whether waiting is forbidden from here on.
    """

    def __init__(self, training: Training, forbid: Callable[[bool], None]) -> None:
        num_steps = len(training.loader)
        style = ProgressStyle(training.config.progress)
        super().__init__(style, "", total_steps=num_steps, done_steps=0, epochs=1)
        self.num_plain, self._last, self._training, self._forbid = 0, num_steps, training, forbid

    def step(self) -> None:
        """Count the step that ends, and look at the one that begins."""
        super().step()
        is_plain = self._training.batch < self._last and not self._training.statistics_due
        self.num_plain += is_plain
        self._forbid(is_plain)


def train(training: Training, forbid: Callable[[bool], None]) -> int:
    """Train one epoch of eight steps, the plain ones of which must not wait, and return their number."""
    steps = Steps(training, forbid)
    result = loop.train_epoch(training, steps)
    steps.close()
    assert training.step == 8
    assert result.loss > 0
    return steps.num_plain


def start(tmp_path, device: str, *overrides: str) -> Training:
    """Return a run of eight steps per epoch before its first."""
    config = tiny_config(tmp_path, "batch_size=50", f"device={device}", *overrides)
    return build_training(config, torch.device(device))


def expected_plain(overrides: tuple[str, ...]) -> int:
    """Return how many of eight steps are watched and neither measure nor refresh."""
    if PERIOD not in overrides:
        return 7  # watching begins with the second step
    return 4 if "preconditioner.factor_period=2" in overrides else 6


@pytest.mark.parametrize("name", one_in(2, SETTINGS))
def test_plain_steps_read_no_value(tmp_path, monkeypatch, name):
    """From the request for a mini-batch to the optimizer's step, no operation that would wait for a GPU is called."""
    overrides = SETTINGS[name]
    training = start(tmp_path, "cpu", *overrides)
    waits = ForbiddenWaits()
    refuse_unseen_reads(monkeypatch, lambda: waits.is_on)

    def forbid(is_forbidden: bool) -> None:
        waits.is_on = is_forbidden

    with waits:
        assert train(training, forbid) == expected_plain(overrides)


@pytest.mark.parametrize(
    "read", [Tensor.item, bool, Tensor.nonzero, lambda loss: loss.tolist(), lambda loss: loss[None][loss[None] > 0]]
)
def test_a_read_in_a_plain_step_is_noticed(tmp_path, monkeypatch, read):
    """The guard above fails if the metrics read the loss of every step, in any of the ways there are."""
    training = start(tmp_path, "cpu", "preconditioner=sua", PERIOD)
    waits = ForbiddenWaits()
    refuse_unseen_reads(monkeypatch, lambda: waits.is_on)
    add = ErrorCounter.add

    def reading(counter, logits, labels, loss):
        read(loss.detach())
        add(counter, logits, labels, loss)

    def forbid(is_forbidden: bool) -> None:
        waits.is_on = is_forbidden

    monkeypatch.setattr(ErrorCounter, "add", reading)
    with waits, pytest.raises(AssertionError, match="waits for the device"):
        train(training, forbid)
    assert training.step == 1  # the first plain step


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("overrides", CUDA_SETTINGS.values(), ids=CUDA_SETTINGS)
def test_plain_steps_never_synchronise_on_cuda(tmp_path, overrides):
    """PyTorch itself raises where the host would wait for the GPU in a plain step."""
    training = start(tmp_path, "cuda", "capture=false", *overrides)

    def forbid(is_forbidden: bool) -> None:
        torch.cuda.set_sync_debug_mode("error" if is_forbidden else "default")

    try:
        assert train(training, forbid) == expected_plain(overrides)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_read_on_cuda_is_noticed(tmp_path, monkeypatch):
    """The guard above fails if the metrics read the loss of every step."""
    training = start(tmp_path, "cuda", "preconditioner=sua", PERIOD)
    add = ErrorCounter.add

    def reading(counter, logits, labels, loss):
        loss.item()
        add(counter, logits, labels, loss)

    def forbid(is_forbidden: bool) -> None:
        torch.cuda.set_sync_debug_mode("error" if is_forbidden else "default")

    monkeypatch.setattr(ErrorCounter, "add", reading)
    try:
        with pytest.raises(RuntimeError, match="synchroniz"):
            train(training, forbid)
    finally:
        torch.cuda.set_sync_debug_mode("default")
