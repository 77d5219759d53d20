"""Operations of a step: counted without a GPU, and kept from growing."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from unseen_reads import refuse_unseen_reads

from kfac_sua.bench.arithmetic import Arithmetic
from kfac_sua.bench.contender import Batch, Contender
from kfac_sua.bench.operations import OperationCounter, count_operations
from kfac_sua.bench.settings import compose_settings, parse_items
from kfac_sua.preconditioner import KroneckerPreconditioner
from kfac_sua.preconditioner.forms.rates import CUDA, rates_in_force

STRUCTURES = ["kfac", "sua", "grouped", "sua_grouped"]
WEIGHT = "application=weight"
"""``auto`` depends on sizes, and these are an eighth of the paper's."""

# Launches beyond those of plain SGD, of a plain step and of a refresh, as counted when these were written.
MOST = {
    ("vgg11", "cpu"): {"kfac": (79, 533), "sua": (23, 222), "grouped": (39, 428), "sua_grouped": (25, 184)},
    ("vgg11", "cuda"): {"kfac": (21, 418), "sua": (21, 240), "grouped": (39, 232), "sua_grouped": (25, 195)},
    ("preact_resnet50", "cpu"): {
        "kfac": (113, 1101),
        "sua": (113, 637),
        "grouped": (147, 1021),
        "sua_grouped": (115, 555),
    },
    ("preact_resnet50", "cuda"): {
        "kfac": (111, 832),
        "sua": (111, 700),
        "grouped": (147, 725),
        "sua_grouped": (115, 660),
    },
    ("transformer", "cuda"): {"kfac": (90, 417), "sua": (90, 417), "grouped": (111, 371), "sua_grouped": (111, 371)},
}
TOLERANCE = 0.05
"""Of other releases of PyTorch, which take some operations apart in other ways."""


def operations_of(model: str, names: list[str], rates: str):
    """Return the operations of plain SGD and of settings, by the rates of a type of device, on a CPU."""
    options = {"model": model, "model.width": 0.125, "batch_size": 20, "device": "cpu"}
    group_sizes = {"grouped": ",group_size=32", "sua_grouped": ",group_size=32"}  # 4 at this width
    items = parse_items([f"{name}:{WEIGHT}{group_sizes.get(name, '')}" for name in names])
    settings = compose_settings(items, [], options)
    arithmetic = Arithmetic("float32", torch.device("cpu"))
    batch = Batch.random(20, arithmetic)
    with rates_in_force(CUDA, "cpu") if rates == "cuda" else nullcontext():
        counts = []
        for setting in settings:
            contender = Contender(setting.config, arithmetic, batch)
            contender.timed_step()
            contender.timed_step()
            counts.append(count_operations(contender))
        return counts


@pytest.fixture(autouse=True)
def no_unseen_reads(monkeypatch):
    """Refuse reads that no counter sees, while operations are counted."""
    refuse_unseen_reads(
        monkeypatch, lambda: any(isinstance(mode, OperationCounter) for mode in _get_current_dispatch_mode_stack())
    )


@pytest.mark.parametrize(
    ("model", "rates"),
    [pytest.param(*one, marks=pytest.mark.slow if one[0] == "preact_resnet50" else ()) for one in MOST],
)
def test_operations_do_not_grow(model, rates):
    """For every structure, on plain steps and on refreshes; a refresh waits for the device once, a plain step never."""
    plain_sgd, *counts = operations_of(model, STRUCTURES, rates)
    base = plain_sgd["plain"].launches
    assert plain_sgd["plain"].waits == 0
    for name, own in zip(STRUCTURES, counts, strict=True):
        most = MOST[model, rates][name]
        found = own["plain"].launches - base, own["refresh"].launches - base
        assert all(0 < one <= limit * (1 + TOLERANCE) for one, limit in zip(found, most, strict=True)), (name, found)
        assert (own["plain"].waits, own["refresh"].waits) == (0, 1), name


def test_views_and_waits_are_told_from_launches():
    """A view and an empty tensor launch nothing, a read waits."""
    values = torch.ones(2, 3)
    with OperationCounter() as counter:
        values.view(6)[1:].add_(1)  # [5]
        torch.empty(3)
        (values @ values.mT).sum().item()
    counted = counter.counted
    assert (counted.launches, counted.waits) == (3, 1)
    assert counted.views == 2 + 1 + 1 + 1  # view, slice; empty; transpose; the read itself


@pytest.mark.parametrize("rule", ["factored", "factored_pi"])
@pytest.mark.parametrize("structure", ["kfac", "sua"])
def test_statistics_that_are_not_finite_cost_no_wait_of_their_own(structure, rule):
    """The factorisation finds them; then they are dropped, the inverse stays, and later statistics count again."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3))
    preconditioner = KroneckerPreconditioner(net, structure=structure, damping_rule=rule, inverse_period=1)
    waits, inverses = [], []
    for scale in (1.0, float("nan"), 1.0):
        net.zero_grad()
        loss = nn.functional.cross_entropy(net(torch.randn(4, 2, 4, 4)), torch.tensor([0, 1, 2, 0]))
        (loss * scale).backward()
        with OperationCounter() as counter:
            preconditioner.step()
        waits.append(counter.counted.waits)
        inverses.append([tensor.clone() for layer in preconditioner.layers for tensor in layer.inverse.tensors()])
    assert waits[0] == waits[2] == 1
    assert preconditioner.events["non_finite_statistics:0"] == 1
    assert all(torch.equal(one, other) for one, other in zip(inverses[0], inverses[1], strict=True))
    assert not all(torch.equal(one, other) for one, other in zip(inverses[1], inverses[2], strict=True))
