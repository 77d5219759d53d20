"""Captured steps on a CUDA device: equal to eager ones, without waiting for it, and in about as much memory."""

import copy
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from captured_training import LR, Case, Training, make_net, num_plain, sgd, with_dropout
from torch import nn

from kfac_sua.models import VGG11
from kfac_sua.preconditioner import CapturedStep, KroneckerPreconditioner
from kfac_sua.preconditioner.captured.step import WARM_UP_STEPS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CASES: dict[str, dict[str, Any]] = {
    "sgd": {"settings": None},
    "kfac": {"settings": {"structure": "kfac"}},
    "sua": {"settings": {"structure": "sua"}},
    "grouped": {"settings": {"structure": "kfac", "group_size": 6}},
    "sua_grouped": {"settings": {"structure": "sua", "group_size": 6}},
    "activation_only": {"settings": {"structure": "activation_only"}},
    "eigenvalue_corrected": {"settings": {"structure": "eigenvalue_corrected"}},
    "kfac auto": {"settings": {"structure": "kfac", "application": "auto"}},
    "sua auto": {"settings": {"structure": "sua", "application": "auto"}},
    "exact": {"settings": {"structure": "sua", "damping_rule": "exact"}},
    "cholesky": {"settings": {"structure": "kfac", "inverse_method": "cholesky"}},
    "mc": {"settings": {"structure": "kfac", "fisher_type": "mc"}},
    "average": {"settings": {"structure": "sua", "ema_decay": 0.5, "factor_period": 10}},
    "kl_clip": {"settings": {"structure": "sua", "kl_clip": 1e-3}},
    "clipping": {"settings": {}, "after_backward": lambda net: nn.utils.clip_grad_norm_(net.parameters(), 0.5)},
    "fused": {"settings": {}, "optimizer": lambda net: sgd(net, lr=torch.tensor(LR, device="cuda"), fused=True)},
    "adamw": {
        "settings": {},
        "optimizer": lambda net: torch.optim.AdamW(
            net.parameters(), lr=torch.tensor(LR / 10, device="cuda"), fused=True
        ),
    },
    "dropout": {"settings": {"structure": "sua"}, "make": lambda: with_dropout().double()},
}


@contextmanager
def no_waiting() -> Iterator[None]:
    """Let PyTorch raise where the host would wait for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


LONG = ("sgd", "kfac", "sua", "grouped", "sua_grouped")


@pytest.mark.parametrize("name", CASES)
def test_captured_training_is_eager_training(name):
    """Over 200 steps and ten refreshes in float64, in which another order of summation stays below 1e-6.

    For the structures, that is; 60 steps and three refreshes for what is varied from them.
    """
    num_steps = 200 if name in LONG else 60
    case = Case(**{"make": lambda: make_net().double()} | CASES[name])
    trainings = [Training(case, is_captured=is_captured, device="cuda") for is_captured in (False, True)]
    losses = []
    for training in trainings:
        torch.manual_seed(7)
        losses.append(training.take(num_steps))
    captured = trainings[1].captured
    assert captured.why_eager == ""
    assert (captured.num_captures, captured.num_replays) == (1, num_plain(case, num_steps) - WARM_UP_STEPS)
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=1e-6, atol=1e-6)
    for name, value in trainings[1].net.state_dict().items():
        torch.testing.assert_close(value, trainings[0].net.state_dict()[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["sgd", "kfac", "sua auto", "sua_grouped", "kl_clip", "exact", "fused", "adamw"])
@pytest.mark.parametrize("is_captured", [True, False])
def test_plain_steps_wait_for_nothing(name, is_captured):
    """Neither replays nor eager plain steps, their copies of the mini-batch included."""
    training = Training(Case(**CASES[name]), is_captured=is_captured, device="cuda")
    images, labels = (tensor.cuda() for tensor in next(iter(batch())))
    for _ in range(1 + WARM_UP_STEPS + 1):  # the last one captures
        training._step(images, labels)
    num_replays = training.captured.num_replays
    with no_waiting():
        for _ in range(10):
            training._step(images, labels)
    assert training.captured.num_replays == num_replays + (10 if is_captured else 0)


def batch() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return one mini-batch."""
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(8, 3, 8, 8, generator=generator), torch.randint(0, 10, (8,), generator=generator))]


def test_a_wait_in_a_replayed_loop_is_noticed():
    """The guard above can fail: reading the loss waits."""
    training = Training(Case(None), is_captured=True, device="cuda")
    training.take(6)
    num_replays = training.captured.num_replays
    (images, labels), *_ = batch()
    images, labels = images.cuda(), labels.cuda()
    with no_waiting():
        loss = training._step(images, labels)
        with pytest.raises(RuntimeError, match="synchroniz"):
            float(loss)
    assert training.captured.num_replays == num_replays + 1


def test_learning_rate_reaches_the_graph():
    """A number in the groups of a fused optimizer is read at each replay."""
    results = []
    for is_captured in (False, True):
        case = Case({"structure": "sua"}, lambda: make_net().double(), lambda net: sgd(net, fused=True))
        training = Training(case, is_captured=is_captured, device="cuda")
        for epoch in range(4):
            training.optimizers[0].param_groups[0]["lr"] = LR * 0.5**epoch
            training.take(10, start=10 * epoch)
        results.append(training.net.state_dict())
    assert training.captured.num_captures == 1
    for name, value in results[1].items():  # the rate is rounded to float32 on the device
        torch.testing.assert_close(value, results[0][name], rtol=1e-5, atol=1e-6)


def test_captures_anew_on_another_stream_and_after_changes():
    """Frozen layers, loaded states and a stream of the caller's."""
    results = []
    for is_captured in (False, True):
        case = Case({"structure": "kfac"}, lambda: make_net().double())
        training = Training(case, is_captured=is_captured, device="cuda")
        training.take(4)
        state = copy.deepcopy(training.preconditioner.state_dict())
        training.take(4, start=4)
        training.preconditioner.load_state_dict(state)  # in place
        training.net[4].weight.requires_grad_(False)
        with torch.cuda.stream(torch.cuda.Stream()):
            training.take(30, start=8)
        torch.cuda.synchronize()
        results.append(training.net.state_dict())
    assert training.captured.num_captures == 2
    for name, value in results[1].items():
        torch.testing.assert_close(value, results[0][name], rtol=1e-6, atol=1e-6)


REFUSED: dict[str, tuple[Callable[[torch.Tensor], Any], str]] = {
    "item": (lambda loss: loss.item(), "it reads a value back to the host"),
    "cpu": (lambda loss: loss.cpu(), "it makes a tensor that is not on cuda:0"),
    "constant": (lambda loss: loss * torch.tensor(2.0, device="cuda"), "it makes a tensor of Python numbers"),
    "host tensor": (lambda loss: loss * torch.ones(()), "it makes a tensor that is not on cuda:0"),
    "nonzero": (lambda loss: loss[None].nonzero(), "it makes a tensor whose size depends on values"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_graph_cannot_hold_stays_eager(name):
    """With the reason, before any capture is tried."""
    change, reason = REFUSED[name]
    training = Training(Case({"structure": "sua"}), is_captured=True, device="cuda")
    function = training.captured._function
    training.captured._function = lambda *inputs: (change(function(*inputs)), training.total)[1]
    training.take(10)
    assert training.captured.why_eager.startswith(reason)
    assert training.preconditioner.num_steps == 10


def test_a_capture_that_cuda_breaks_off_leaves_no_trace():
    """Training goes on eagerly on the caller's stream, dropout included, bit for bit but for the order of summation."""
    results = []
    for is_captured in (False, True):
        case = Case({"structure": "sua"}, make=lambda: with_dropout().double())
        training = Training(case, is_captured=is_captured, device="cuda")
        function = training.captured._function

        captures = []

        def breaking(*inputs: torch.Tensor, function: Callable[..., Any] = function, captures: Any = captures) -> Any:
            loss = function(*inputs)
            if torch.cuda.is_current_stream_capturing():
                captures.append(True)
                torch.cuda.synchronize()  # not allowed, and no operation of PyTorch's
            return loss

        training.captured._function = breaking
        torch.manual_seed(7)
        training.take(30)
        results.append(training.net.state_dict())
    assert captures == [True]
    assert training.captured.why_eager
    assert training.captured.num_captures == training.captured.num_replays == 0
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    for name, value in results[1].items():
        torch.testing.assert_close(value, results[0][name], rtol=1e-6, atol=1e-6)


def peak_bytes(settings: dict[str, Any] | None, *, is_captured: bool) -> int:
    """Return the most memory that VGG11 at full width reserves over three refreshes, mini-batches of 100."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_reserved()
    net = VGG11(10).cuda().to(memory_format=torch.channels_last)
    optimizer = sgd(net, lr=1e-3, fused=True)
    preconditioner = None
    if settings is not None:
        preconditioner = KroneckerPreconditioner(net, inverse_period=20, damping=1.0, **settings)

    def function(images: torch.Tensor, labels: torch.Tensor) -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(images), labels).backward()
        if preconditioner is not None:
            preconditioner.step()
        optimizer.step()

    step = CapturedStep(function, net, optimizer, preconditioner)
    images = torch.randn(100, 3, 32, 32, device="cuda").to(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (100,), device="cuda")
    for _ in range(45):
        (step if is_captured else function)(images, labels)
    torch.cuda.synchronize()
    assert step.num_captures == is_captured
    return torch.cuda.max_memory_reserved() - before


@pytest.mark.parametrize("name", ["sgd", "kfac", "sua", "grouped", "sua_grouped"])
def test_graph_and_refreshes_share_their_memory(name):
    """Captured training reserves at most 1.3 times what eager training does."""
    settings = None if name == "sgd" else {**CASES[name]["settings"], "group_size": 32 if "grouped" in name else None}
    eager, captured = (peak_bytes(settings, is_captured=is_captured) for is_captured in (False, True))
    assert captured <= 1.3 * eager, f"{captured / 2**20:.0f} against {eager / 2**20:.0f} MiB"
