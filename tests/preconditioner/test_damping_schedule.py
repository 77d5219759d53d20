"""Damping that changes during training: when it takes effect, which values it may have, and exact continuation."""

import math

import numpy as np
import pytest
import torch
from continuation import continued_bit_for_bit
from thinned import diagonal
from torch import nn

from kfac_sua.preconditioner import (
    DampingScheduler,
    KroneckerPreconditioner,
    KroneckerSettings,
    exponential_damping,
)

RULES = ["factored", "factored_pi", "exact"]
PERIOD = 3


def make_net() -> nn.Module:
    """Return a small float64 net."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 2, bias=False), nn.Flatten(), nn.Linear(12, 3))
    return net.double()


def batch(index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mini-batch ``index``."""
    generator = torch.Generator().manual_seed(index)
    inputs = torch.randn(6, 2, 5, 5, generator=generator, dtype=torch.float64)
    return inputs, torch.randint(0, 3, (6,), generator=generator)


def preconditioned(net: nn.Module, preconditioner: KroneckerPreconditioner, index: int) -> list[torch.Tensor]:
    """Return the preconditioned gradient of a mini-batch, without a step of the optimizer."""
    inputs, labels = batch(index)
    net.zero_grad()
    nn.functional.cross_entropy(net(inputs), labels).backward()
    preconditioner.step()
    return [parameter.grad.clone() for parameter in net.parameters()]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("structure", ["kfac", "sua"])
def test_a_new_damping_enters_with_the_next_refresh(rule, structure):
    """Until the refresh nothing changes; from it on, everything is as with a preconditioner made with the new one."""
    options = {"structure": structure, "damping_rule": rule, "inverse_period": PERIOD}
    nets = [make_net() for _ in range(3)]
    changed, old = (KroneckerPreconditioner(net, damping=0.3, **options) for net in nets[:2])
    new = KroneckerPreconditioner(nets[2], damping=0.02, **options)
    for index in range(PERIOD):
        for got, want in zip(preconditioned(nets[0], changed, index), preconditioned(nets[1], old, index), strict=True):
            assert torch.equal(got, want)
        changed.damping = 0.02
    of_all = (preconditioned(net, one, PERIOD) for net, one in zip(nets, (changed, old, new), strict=True))
    for got, before, want in zip(*of_all, strict=True):
        assert torch.equal(got, want)
        assert not torch.allclose(got, before)
    assert changed.damping == 0.02
    assert changed.settings.damping == 0.3


@pytest.mark.parametrize("value", [0, -1.0, math.nan, math.inf, 1e-40, "0.1", True, None, torch.ones(2)])
def test_a_bad_damping_is_refused_with_the_sentence_of_the_constructor(value):
    """Setter, function and scheduler say what the settings say, and the damping stays."""
    with pytest.raises(ValueError, match=r"^damping must be a number.*, got ") as of_settings:
        KroneckerSettings(damping=value)
    preconditioner = KroneckerPreconditioner(make_net(), damping=0.1)
    with pytest.raises(ValueError, match=r"^damping must be") as of_setter:
        preconditioner.damping = value
    assert str(of_setter.value) == str(of_settings.value)
    assert preconditioner.damping == 0.1
    later = KroneckerPreconditioner(make_net(), damping=lambda step: value if step else 0.1, inverse_period=1)
    preconditioned(later.model, later, 0)
    with pytest.raises(ValueError, match=r"^damping must be") as of_function:
        preconditioned(later.model, later, 1)
    assert str(of_function.value) == str(of_settings.value)


def test_a_function_is_asked_at_each_refresh_and_checked_there():
    """It is given the number of steps taken; a bad value of a later step is an error of that step."""
    net = make_net()
    preconditioner = KroneckerPreconditioner(
        net, damping=lambda step: (0.5, 0.4, 0.3, 0.2, 0.1, 0, -1)[step], inverse_period=2
    )
    seen = []
    for index in range(5):
        seen.append(preconditioner.damping)
        preconditioned(net, preconditioner, index)
    assert seen == [0.5, 0.4, 0.3, 0.2, 0.1]
    preconditioned(net, preconditioner, 5)  # no refresh: nobody asks
    with pytest.raises(ValueError, match=r"^damping must be a number > 0 within the range of float32, got -1\.$"):
        preconditioned(net, preconditioner, 6)


def test_a_function_equals_setting_the_damping_before_every_step():
    """Both ways give the same gradients to the last bit."""
    function = exponential_damping(1.0, 0.01, 8)
    first, second = make_net(), make_net()
    by_function = KroneckerPreconditioner(first, damping=function, inverse_period=PERIOD)
    by_hand = KroneckerPreconditioner(second, damping=1.0, inverse_period=PERIOD)
    for index in range(10):
        by_hand.damping = function(index)
        gradients = (preconditioned(first, by_function, index), preconditioned(second, by_hand, index))
        for got, want in zip(*gradients, strict=True):
            assert torch.equal(got, want)


def test_a_function_and_a_setter_contradict_each_other():
    """What the function would undo is refused."""
    preconditioner = KroneckerPreconditioner(make_net(), damping=lambda step: 0.1)
    with pytest.raises(ValueError, match="damping was given as a function of the step"):
        preconditioner.damping = 0.2
    with pytest.raises(ValueError, match="damping was given as a function of the step"):
        DampingScheduler(preconditioner, lambda call: 0.5**call)


def test_exponential_damping():
    """Geometric in between, constant afterwards, in either direction."""
    falling, rising = exponential_damping(1.0, 0.01, 4), exponential_damping(0.01, 1.0, 2)
    assert [falling(step) for step in (0, 1, 2, 3, 4, 5)] == pytest.approx([1, 10**-0.5, 0.1, 10**-1.5, 0.01, 0.01])
    assert [rising(step) for step in (0, 1, 2, 9)] == pytest.approx([0.01, 0.1, 1, 1])
    assert falling(4) == 0.01
    with pytest.raises(ValueError, match=r"damping must be a number > 0 within the range of float32, got 0\."):
        exponential_damping(1.0, 0, 4)
    with pytest.raises(ValueError, match=r"num_steps must be >= 1, got 0\."):
        exponential_damping(1.0, 0.1, 0)


def test_scheduler_multiplies_the_first_damping():
    """As LambdaLR: factor(0) at once, then one call further each time."""
    preconditioner = KroneckerPreconditioner(make_net(), damping=0.8)
    scheduler = DampingScheduler(preconditioner, lambda call: 1 / (1 + call))
    dampings = [preconditioner.damping]
    for _ in range(3):
        scheduler.step()
        dampings.append(preconditioner.damping)
    assert dampings == pytest.approx([0.8, 0.4, 0.8 / 3, 0.2])
    with pytest.raises(ValueError, match=r"got -0\.8"):
        DampingScheduler(preconditioner, lambda call: -4.0)


class Run:
    """A training run whose damping changes in one of several ways."""

    def __init__(self, way: str, rule: str) -> None:
        self.net = make_net()
        damping = (lambda step: 0.4 / (1 + step)) if way == "function" else 0.4
        self.preconditioner = KroneckerPreconditioner(
            self.net, damping=damping, damping_rule=rule, inverse_period=PERIOD
        )
        self.scheduler = DampingScheduler(self.preconditioner, lambda call: 0.7**call) if way == "scheduler" else None
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.05, momentum=0.9)
        self.way = way

    def train(self, steps: range) -> None:
        """Take steps."""
        for index in steps:
            preconditioned(self.net, self.preconditioner, index)
            self.optimizer.step()
            if self.scheduler is not None:
                self.scheduler.step()
            elif self.way == "setter" and index == 1:
                self.preconditioner.damping = 0.05

    @property
    def parts(self) -> list:
        """Everything that has a state."""
        parts = [self.net, self.optimizer, self.preconditioner]
        return parts if self.scheduler is None else [*parts, self.scheduler]


@pytest.mark.parametrize(
    ("pause", "way", "rule"), diagonal([2, 3, 4], ["function", "setter", "scheduler"], ["factored", "exact"])
)
def test_continuation_is_bit_equal(way, rule, pause):
    """Saved after a change of damping, before and after the refresh that takes it up, training goes on bit for bit."""
    whole, _, second = continued_bit_for_bit(lambda: Run(way, rule), pause=pause, num_steps=8)
    assert second.preconditioner.damping == whole.preconditioner.damping


def test_a_function_given_anew_decides_over_the_state():
    """A continuation may be given another function; a number other than the first damping stays an error."""
    state = KroneckerPreconditioner(make_net(), damping=0.3).state_dict()
    function = KroneckerPreconditioner(make_net(), damping=lambda step: 0.7)
    function.load_state_dict(state)
    assert function.damping == 0.7
    with pytest.raises(ValueError, match=r"saved with other settings: damping=0.3 \(here 0.7\)"):
        KroneckerPreconditioner(make_net(), damping=0.7).load_state_dict(state)


def test_what_cannot_be_inverted_is_named_with_the_damping_in_force():
    """The sentence speaks of the damping that failed, not of the first one."""
    net = make_net().float()
    preconditioner = KroneckerPreconditioner(net, damping=0.1, inverse_method="low_rank")
    preconditioner.damping = 1e-37
    inputs, labels = batch(0)
    nn.functional.cross_entropy(net(inputs.float() * 1e6), labels).backward()
    with pytest.raises(RuntimeError, match="with damping 1e-37; raise the damping"):
        preconditioner.step()


def test_a_function_is_checked_when_the_preconditioner_is_made():
    """A function that is wrong from the start is refused before the first step."""
    with pytest.raises(ValueError, match=r"^damping must be a number > 0 within the range of float32, got 0\.$"):
        KroneckerPreconditioner(make_net(), damping=lambda step: 0)
    with pytest.raises(ValueError, match=r"^damping must be a number, got None\.$"):
        KroneckerPreconditioner(make_net(), damping=lambda step: None)


@pytest.mark.parametrize("make", [np.float32, np.float64, np.array, torch.tensor])
def test_schedules_may_compute_with_numpy_or_tensors(make):
    """Whatever a function or a scheduler's factor returns, and what they are made of, the damping is a plain number."""
    function = exponential_damping(make(0.5), make(0.125), np.int64(2))
    assert [function(step) for step in range(3)] == [0.5, 0.25, 0.125]
    by_function = KroneckerPreconditioner(nn.Linear(2, 2), damping=lambda step: make(0.5))
    scheduled = KroneckerPreconditioner(nn.Linear(2, 2), damping=0.5)
    scheduler = DampingScheduler(scheduled, lambda calls: make(1.0))
    scheduler.step()
    for preconditioner in (by_function, scheduled):
        assert (preconditioner.damping, type(preconditioner.damping)) == (0.5, float)
        assert type(preconditioner.state_dict()["damping"]) is float


def test_a_factor_that_is_no_number_is_refused():
    """The sentence says what the function of the scheduler returned."""
    with pytest.raises(ValueError, match=r"^the damping scheduler's factor must be a number, got 'half' \(str\)\.$"):
        DampingScheduler(KroneckerPreconditioner(nn.Linear(2, 2)), lambda calls: "half")
