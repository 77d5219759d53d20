"""Adaptive damping: the quadratic model against dense matrices, the rule, and exact continuation."""

import math
import os

import numpy as np
import pytest
import torch
import torch.distributed as dist
from continuation import continued_bit_for_bit
from layer_cases import LAYERS, mean_loss, plain_gradients
from oracles import dense_layers
from process_group import free_ports, run_processes
from thinned import diagonal
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from kfac_sua.preconditioner import AdaptiveDamping, KroneckerPreconditioner, KroneckerSettings
from kfac_sua.preconditioner.adaptive_damping import direction, reduction_ratio
from kfac_sua.preconditioner.apply import quadratic_form

PERIOD = 2
OMEGA = (19 / 20) ** PERIOD


# --- the quadratic model --------------------------------------------------------------------------------------------


def dense_quadratic_form(module: nn.Module, inputs: Tensor, settings: KroneckerSettings, step: list[Tensor]) -> float:
    """Return stepᵀ F step with the dense undamped Kronecker matrix of every convolution group."""
    weight, bias = step[0], step[1] if len(step) > 1 else None
    output_grads, _, _ = plain_gradients(module, inputs)
    groups = dense_layers(module, inputs, output_grads, settings)
    total = 0.0
    for index, layer in enumerate(groups):
        part = weight.chunk(len(groups), 0)[index]
        flat = part.flatten(2).transpose(1, 2).flatten(1) if part.dim() == 4 else part  # [out, taps · in]
        bias_part = None if bias is None else bias.chunk(len(groups), 0)[index]
        vector = torch.cat([flat, bias_part[:, None]], dim=1) if layer.joint else flat
        matrix = layer.scale * torch.kron(layer.gradient, layer.activation)
        total += float(vector.flatten() @ matrix @ vector.flatten())
        if layer.separate:
            total += float(layer.scale * bias_part @ layer.gradient @ bias_part)
    return total


@pytest.mark.parametrize("name", ["linear", "linear_bias", "linear_sequence", "conv", "conv_bias", "conv_groups"])
@pytest.mark.parametrize(("structure", "group_size"), [("kfac", None), ("sua", None), ("kfac", 2), ("sua", 3)])
@pytest.mark.parametrize("method", ["cholesky", "low_rank"])
def test_quadratic_form_equals_the_dense_matrix(name, structure, group_size, method):
    """For factors kept as blocks, rows and patches, with joint and separate biases, without damping."""
    settings = KroneckerSettings(structure=structure, group_size=group_size, inverse_method=method)
    module, inputs = LAYERS[name].build()
    torch.manual_seed(2)
    step = [torch.randn_like(parameter) for parameter in module.parameters()]
    expected = dense_quadratic_form(module, inputs, settings, step)
    preconditioner = KroneckerPreconditioner(module, settings=settings)
    adaptive = AdaptiveDamping(preconditioner)  # keeps the factors
    mean_loss(module(inputs)).backward()
    preconditioner.step()
    (layer,) = preconditioner.layers
    bias = step[1] if len(step) > 1 else None
    assert float(quadratic_form(step[0], bias, layer.layout, layer.factors)) == pytest.approx(expected, rel=1e-10)
    assert adaptive.is_due


def gaussian_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the mean over examples of ½‖y − f‖²."""
    return ((outputs - targets) ** 2).sum(1).mean() / 2


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("lr", [0.03, 0.5])
@pytest.mark.parametrize("rule", ["factored", "exact"])
@pytest.mark.parametrize("structure", ["kfac", "sua"])
def test_ratio_is_one_where_the_quadratic_model_is_exact(bias, lr, rule, structure):
    """On a linear model with a Gaussian likelihood, whatever the step: plain, with momentum, with weight decay.

    There the loss is quadratic, its Hessian is the exact Fisher, and that is the Kronecker product.
    """
    torch.manual_seed(0)
    net = nn.Linear(5, 3, bias=bias).double()
    inputs, targets = torch.randn(7, 5, dtype=torch.float64), torch.randn(7, 3, dtype=torch.float64)
    preconditioner = KroneckerPreconditioner(
        net,
        structure=structure,
        fisher_type="exact",
        likelihood="gaussian",
        damping=0.3,
        damping_rule=rule,
        inverse_period=4,
    )
    adaptive = AdaptiveDamping(preconditioner, period=1)
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9, weight_decay=0.01)
    for _ in range(5):
        optimizer.zero_grad()
        outputs = net(inputs)
        preconditioner.fisher_backward(outputs)
        loss = gaussian_loss(outputs, targets)
        loss.backward()
        preconditioner.step()
        optimizer.step()
        with adaptive.measuring():
            loss_after = gaussian_loss(net(inputs), targets)
        if loss_after < loss:
            assert adaptive.update(loss, loss_after) == pytest.approx(1, abs=1e-10)
        else:
            assert adaptive.update(loss, loss_after) is None  # the model foresaw it
    assert adaptive.num_lowered > 0


# --- the rule -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "predicted", "expected"),
    [
        (-1.0, -1.0, -1),
        (-0.76, -1.0, -1),
        (-3.0, -1.0, -1),
        (-0.5, -1.0, 0),
        (-0.75, -1.0, 0),
        (-0.25, -1.0, 0),
        (-0.24, -1.0, 1),
        (0.0, -1.0, 1),
        (1.0, -1.0, 1),
        (math.inf, -1.0, 1),
        (math.nan, -1.0, 1),
        (-1.0, 1.0, 0),  # the model foresaw no reduction, but there was one
        (1.0, 1.0, 1),
        (0.0, 0.0, 0),  # no step was taken
        (1.0, 0.0, 1),
        (math.nan, 1.0, 1),
        (1.0, math.nan, 1),
        (-1.0, math.nan, 0),
    ],
)
def test_direction(change, predicted, expected):
    """Up below the first threshold, down above the second, up where the loss is not finite or rose unforeseen."""
    assert direction(change, predicted, (0.25, 0.75)) == expected


def test_ratio_has_no_meaning_without_a_predicted_reduction():
    """Nothing is divided by zero, and two rises do not look like a good prediction."""
    assert reduction_ratio(-1.0, 0.0) is None
    assert reduction_ratio(1.0, 1.0) is None
    assert reduction_ratio(-0.5, -1.0) == 0.5


# --- in a loop ------------------------------------------------------------------------------------------------------


def make_net() -> nn.Module:
    """Return a float64 net with batch normalisation and a convolution that is preconditioned in the backward pass."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3),
        nn.BatchNorm2d(6),
        nn.ReLU(inplace=True),
        nn.Conv2d(6, 40, 3, bias=False),
        nn.Flatten(),
        nn.Linear(40, 3),
    ).double()


def batch(index: int, size: int = 6) -> tuple[Tensor, Tensor]:
    """Return mini-batch ``index``."""
    generator = torch.Generator().manual_seed(index)
    inputs = torch.randn(size, 2, 5, 5, generator=generator, dtype=torch.float64)
    return inputs, torch.randint(0, 3, (size,), generator=generator)


class Run:
    """A training run with adaptive damping."""

    def __init__(self, lr: float = 0.05, damping: float = 0.2, period: int = PERIOD, **settings) -> None:
        self.net = self.forward = make_net()
        self.preconditioner = KroneckerPreconditioner(self.net, damping=damping, inverse_period=3, **settings)
        self.adaptive = AdaptiveDamping(self.preconditioner, period=period)
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=lr, momentum=0.9)
        self.lr = lr
        self.ratios: list[float | None] = []
        self.dampings: list[float] = []

    def train(self, steps: range, part: slice = slice(None)) -> None:
        """Take steps, on a part of every mini-batch."""
        for index in steps:
            inputs, labels = (values[part] for values in batch(index))
            self.optimizer.zero_grad()
            outputs = self.forward(inputs)
            self.preconditioner.fisher_backward(outputs)
            loss = nn.functional.cross_entropy(outputs, labels)
            loss.backward()
            self.preconditioner.step(lr=self.lr)
            self.optimizer.step()
            assert self.adaptive.is_due == (index % PERIOD == 0)
            if self.adaptive.is_due:
                with self.adaptive.measuring():
                    loss_after = nn.functional.cross_entropy(self.forward(inputs), labels)
                self.ratios.append(self.adaptive.update(loss, loss_after))
            self.dampings.append(self.preconditioner.damping)

    @property
    def parts(self) -> list:
        """Everything that has a state."""
        return [self.net, self.optimizer, self.preconditioner, self.adaptive]


def test_damping_moves_by_omega_to_the_period():
    """Every judged step multiplies the damping by ω^T, divides by it, or leaves it; others never touch it."""
    run = Run()
    run.train(range(12))
    before = 0.2
    for index, damping in enumerate(run.dampings):
        assert damping / before == pytest.approx(1) or (
            index % PERIOD == 0 and damping / before in (pytest.approx(OMEGA), pytest.approx(1 / OMEGA))
        )
        before = damping
    assert run.adaptive.num_lowered + run.adaptive.num_raised > 0
    assert run.dampings[-1] == pytest.approx(0.2 * OMEGA ** (run.adaptive.num_lowered - run.adaptive.num_raised))


def test_steps_that_are_far_too_long_raise_the_damping():
    """At a learning rate of 30 the loss explodes, and every judgement but the first ones says so."""
    run = Run(lr=30.0)
    run.train(range(12))
    assert run.adaptive.num_raised >= 5
    assert run.preconditioner.damping > 0.2


@pytest.mark.parametrize("settings", [{"structure": "kfac"}, {"structure": "sua", "group_size": 4}])
def test_application_in_the_backward_pass_changes_nothing(settings):
    """A judged step keeps its plain gradient until it has been seen; all ratios agree to rounding."""
    weight, auto = Run(application="weight", **settings), Run(application="auto", **settings)
    weight.train(range(9))
    auto.train(range(9))
    assert auto.ratios == pytest.approx(weight.ratios, rel=1e-8)
    assert any(layer.backward_application for layer in auto.preconditioner.layers)


def test_measuring_leaves_no_trace():
    """Buffers come back, nothing is recorded for the statistics, and the training mode stays."""
    run = Run()
    buffers = {name: buffer.clone() for name, buffer in run.net.named_buffers()}
    with run.adaptive.measuring():
        run.net(batch(0)[0])
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in run.net.named_buffers())
    assert run.net.training
    with pytest.raises(RuntimeError, match="no backward pass through the model was recorded"):
        run.preconditioner.update_factors()


def test_adapting_only_observes():
    """With a damping that cannot leave its bounds, training is bit for bit as without."""
    run, plain = Run(), make_net()
    run.adaptive._bounds = (0.2, 0.2)
    run.train(range(8))
    preconditioner = KroneckerPreconditioner(plain, damping=0.2, inverse_period=3)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.05, momentum=0.9)
    for index in range(8):
        inputs, labels = batch(index)
        optimizer.zero_grad()
        nn.functional.cross_entropy(plain(inputs), labels).backward()
        preconditioner.step()
        optimizer.step()
    for got, want in zip(run.net.state_dict().values(), plain.state_dict().values(), strict=True):
        assert torch.equal(got, want)


def test_bounds_hold():
    """The damping stops at the least and at the largest one."""
    run = Run()
    run.adaptive._bounds = (0.19, 0.21)
    for sign, bound in ((-1, 0.19), (1, 0.21)):
        for _ in range(3):
            run.adaptive._move(sign)
        assert run.preconditioner.damping == bound


def test_without_factors_nothing_is_judged():
    """Attached between two refreshes, it waits for the next one, as the last one's factors are gone."""
    run = Run()
    preconditioner = KroneckerPreconditioner(run.net, inverse_period=3)
    run.preconditioner = preconditioner
    due = []
    for index in range(5):
        if index == 1:
            adaptive = AdaptiveDamping(preconditioner, period=1)
        inputs, labels = batch(index)
        nn.functional.cross_entropy(run.net(inputs), labels).backward()
        preconditioner.step()
        if index:
            due.append(adaptive.is_due)
    assert due == [False, False, True, True]
    del adaptive
    nn.functional.cross_entropy(run.net(inputs), labels).backward()
    preconditioner.step()  # an observer that is gone is not asked


def test_a_skipped_mini_batch_is_not_judged():
    """With a loss scale, a gradient that is not finite takes no step; the next mini-batch takes its place."""
    run = Run()
    inputs, labels = batch(0)
    nn.functional.cross_entropy(run.net(inputs), labels).backward()
    run.net[0].weight.grad.fill_(math.inf)
    assert not run.preconditioner.step(loss_scale=1.0)
    assert not run.adaptive.is_due
    run.train(range(2))
    assert len(run.ratios) == 1


CONTINUED = [
    {"structure": "kfac", "inverse_method": "low_rank"},
    {"structure": "kfac", "inverse_method": "auto", "application": "auto"},
    {"structure": "sua", "ema_decay": 0.7, "factor_period": 1, "damping_rule": "exact"},
    {"structure": "sua", "group_size": 4, "kl_clip": 1e-3, "fisher_type": "mc"},
]


@pytest.mark.parametrize(("pause", "settings"), diagonal([1, 2, 3, 5], CONTINUED), ids=str)
def test_continuation_is_bit_equal(settings, pause):
    """Saved at any point of both periods, training goes on bit for bit, dampings and ratios included."""
    whole, first, second = continued_bit_for_bit(lambda: Run(**settings), pause=pause, num_steps=9)
    assert first.ratios + second.ratios == whole.ratios
    assert first.dampings + second.dampings == whole.dampings
    assert len(set(whole.dampings)) > 1
    assert second.adaptive.state_dict() == whole.adaptive.state_dict()


def test_misuse_is_named():
    """Each in one sentence, before anything changes."""
    run = Run()
    with pytest.raises(RuntimeError, match=r"^update\(\) has no step to judge: call it after a step for which is_due"):
        run.adaptive.update(1.0, 0.5)
    net = make_net()
    preconditioner = KroneckerPreconditioner(net)
    for options, sentence in {
        ("period", 0): r"period must be >= 1 step, got 0\.",
        ("decay", 1.0): r"decay must be in \(0, 1\), got 1\.0\.",
        ("thresholds", (0.75, 0.25)): r"thresholds must be increasing, got \(0\.75, 0\.25\)\.",
        ("bounds", (0.0, 1.0)): r"bounds must be increasing and > 0, got \(0\.0, 1\.0\)\.",
        ("bounds", (1.0, 2.0)): r"^damping=0\.1 is outside of the bounds 1 to 2 .*; start within them\.",
    }.items():
        with pytest.raises(ValueError, match=sentence):
            AdaptiveDamping(preconditioner, **{options[0]: options[1]})
    with pytest.raises(ValueError, match="damping was given as a function of the step"):
        AdaptiveDamping(KroneckerPreconditioner(net, damping=lambda step: 0.1))
    with pytest.raises(ValueError, match="loss_reduction=sum scales loss and Fisher differently"):
        AdaptiveDamping(KroneckerPreconditioner(net, loss_reduction="sum"))


# --- in several processes -------------------------------------------------------------------------------------------


def share(run: Run, rank: int) -> None:
    """Train on half of every mini-batch."""
    run.forward = DistributedDataParallel(run.net)
    run.train(range(7), slice(3 * rank, 3 * rank + 3))


def without_batch_norm() -> Run:
    """Return a run whose batch normalisation does not depend on the mini-batch, which processes do not share."""
    run = Run()
    for module in run.net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return run


def work(rank: int, port: int, directory: str) -> None:
    """Train as one of two processes."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    run = without_batch_norm()
    share(run, rank)
    torch.save([run.ratios, run.dampings], f"{directory}/{rank}.pt")
    dist.destroy_process_group()


def test_processes_decide_alike_and_as_one(tmp_path):
    """Two processes have the same dampings to the last bit, and the ratios of one process with all examples."""
    run_processes(work, 2, *free_ports(1), str(tmp_path))
    results = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    assert results[0] == results[1]
    run = without_batch_norm()
    run.train(range(7))
    ratios, dampings = results[0]
    assert ratios == pytest.approx(run.ratios, rel=1e-8)
    assert dampings == pytest.approx(run.dampings, rel=1e-12)


def test_numbers_of_numpy_and_tensors_become_plain():
    """The damping that they lead to is a plain number, with which a checkpoint stays loadable."""
    layer = nn.Linear(3, 2)
    preconditioner = KroneckerPreconditioner(layer, damping=0.5)
    adaptive = AdaptiveDamping(
        preconditioner,
        period=np.int64(1),
        decay=np.float32(0.5),
        thresholds=torch.tensor([0.25, 0.75]),
        bounds=np.array([0.125, 2.0]),
    )
    layer(torch.ones(4, 3)).square().mean().backward()
    preconditioner.step()
    adaptive.update(np.float32(1.0), torch.tensor(5.0))
    assert (preconditioner.damping, type(preconditioner.damping)) == (1.0, float)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"period": 2.5}, r"^period must be an integer, got 2\.5\.$"),
        ({"decay": "0.9"}, r"^decay must be a number, got '0\.9' \(str\)\.$"),
        ({"thresholds": 0.5}, r"^thresholds must be two numbers, got 0\.5\.$"),
        (
            {"thresholds": torch.tensor(0.5)},
            r"^thresholds must be two numbers, got tensor\(0\.5000\) \(torch\.Tensor\)\.$",
        ),
        ({"bounds": (1e-6, 1.0, 2.0)}, r"^bounds must be two numbers, got \(1e-06, 1\.0, 2\.0\) \(tuple\)\.$"),
        ({"bounds": (None, 1.0)}, r"^each of bounds must be a number, got None\.$"),
    ],
)
def test_what_is_no_number_is_refused(options, sentence):
    """The sentence names the argument."""
    with pytest.raises(ValueError, match=sentence):
        AdaptiveDamping(KroneckerPreconditioner(nn.Linear(3, 2)), **options)
