"""Two or three processes that share a mini-batch train as one process with all of it."""

import math
import os

import pytest
import torch
import torch.distributed as dist
from identical import assert_identical
from process_group import free_ports, run_processes
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from kfac_sua.preconditioner import KroneckerPreconditioner, KroneckerSettings, invert
from kfac_sua.preconditioner.factors import LayerFactors
from kfac_sua.preconditioner.forms import DenseFactor

SETTINGS = {
    "kfac": {"structure": "kfac"},
    "kfac-low_rank": {"structure": "kfac", "inverse_method": "low_rank"},
    "kfac-dense": {"structure": "kfac", "inverse_method": "cholesky"},
    "kfac-reduce": {"structure": "kfac", "weight_sharing": "reduce"},
    "kfac-exact-damping": {"structure": "kfac", "damping_rule": "exact"},
    "kfac-pi": {"structure": "kfac", "damping_rule": "factored_pi"},
    "sua": {"structure": "sua", "application": "auto"},
    "sua-mc": {"structure": "sua", "fisher_type": "mc"},
    "grouped": {"structure": "kfac", "group_size": 3, "application": "auto"},
    "grouped-low_rank": {"structure": "kfac", "group_size": 3, "inverse_method": "low_rank"},
    "sua_grouped-average": {"structure": "sua", "group_size": 4, "ema_decay": 0.5, "factor_period": 1},
    "kfac-exact-fisher": {"structure": "kfac", "fisher_type": "exact"},
    "activation_only": {"structure": "activation_only"},
    "activation_only-average": {"structure": "activation_only", "ema_decay": 0.5, "factor_period": 1},
}
NUM_STEPS, NUM_EXAMPLES, NUM_CLASSES = 20, 11, 3  # eleven: no process count divides them


def balances(size: int) -> dict[str, float]:
    """Return FLOPs per byte by setting: every other one shares all inverses, with three processes the others."""
    chosen = {name: 0.0 if (index + size) % 2 else math.inf for index, name in enumerate(SETTINGS)}
    return chosen | {"kfac-pi": 1.0}  # some inverses are shared, some are not


def make_net() -> nn.Module:
    """Return a float64 net with a strided, a grouped and a small-map convolution, and biases."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 6, 3, padding=1, bias=False),
        nn.ReLU(inplace=True),
        nn.Conv2d(6, 8, 3, stride=2, padding=1, groups=2),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 70, 3, padding=1, bias=False),
        nn.Flatten(),
        nn.Linear(280, NUM_CLASSES),
    ).double()


def train(
    settings: dict, rank: int, size: int, *, num_steps: int = NUM_STEPS, **options
) -> tuple[nn.Module, KroneckerPreconditioner]:
    """Train on this process's part of every mini-batch and return the net and its preconditioner."""
    net = make_net()
    model = DistributedDataParallel(net) if size > 1 else net
    preconditioner = KroneckerPreconditioner(net, settings=KroneckerSettings(inverse_period=4, **settings), **options)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.9)
    generator = torch.Generator().manual_seed(1)
    for _ in range(num_steps):
        inputs = torch.randn(NUM_EXAMPLES, 4, 4, 4, generator=generator, dtype=torch.float64)
        labels = torch.randint(NUM_CLASSES, (NUM_EXAMPLES,), generator=generator)
        inputs, labels = inputs.tensor_split(size)[rank], labels.tensor_split(size)[rank]
        optimizer.zero_grad()
        logits = model(inputs)
        preconditioner.fisher_backward(logits)
        # DistributedDataParallel averages over processes, whose parts differ in size.
        weight = size * len(labels) / NUM_EXAMPLES
        (nn.functional.cross_entropy(logits, labels) * weight).backward()
        preconditioner.step(loss_weight=weight)
        optimizer.step()
    return net, preconditioner


def result(net: nn.Module, preconditioner: KroneckerPreconditioner) -> dict:
    """Return parameters, state, and what was shared, as a file can hold them."""
    sharing = preconditioner.describe().sharing
    return {
        "parameters": {name: parameter.detach() for name, parameter in net.named_parameters()},
        "state": preconditioner.state_dict(),
        "blocks": sharing and (sharing.num_shared, sharing.num_everywhere),
    }


def refresh_with_a_bad_block(eigenvalue: float, rank: int, size: int, *, num_steps: int) -> dict:
    """Refresh when one block of a layer's activation factor has this eigenvalue; return what became of it."""
    num_repaired, repair = [], invert._repaired
    invert._repaired = lambda *arguments: num_repaired.append(1) or repair(*arguments)
    try:
        net, preconditioner = train(
            {"structure": "kfac", "group_size": 3}, rank, size, num_steps=num_steps, flops_per_byte=0.0
        )
        layer = preconditioner._layers["4"]
        blocks = [torch.eye(27) * (eigenvalue if index == 1 else 1.0) for index in range(3)]
        factors = [DenseFactor(torch.stack(blocks).double()), DenseFactor(torch.eye(3).repeat(24, 1, 1).double())]
        layer.add_measurement(LayerFactors(*factors, scale=4.0))
        message = ""
        try:
            preconditioner.update_inverses()
        except RuntimeError as error:
            message = str(error)
    finally:
        invert._repaired = repair
    return result(net, preconditioner) | {"message": message, "num_repaired": len(num_repaired)}


BAD_BLOCKS = {"raised": (-3.0, 1), "kept": (-1e6, 1), "first": (-1e6, 0)}
"""Eigenvalue of the bad block and steps before it."""


def work(rank: int, size: int, port: int, directory: str) -> None:
    """Train with every setting, one after the other, and save what the first and the last process have."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=size)
    chosen = balances(size)
    results = {
        name: result(*train(settings, rank, size, flops_per_byte=chosen[name])) for name, settings in SETTINGS.items()
    }
    for name, (eigenvalue, num_steps) in BAD_BLOCKS.items():
        results[name] = refresh_with_a_bad_block(eigenvalue, rank, size, num_steps=num_steps)
    torch.save(results, f"{directory}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_processes_train_as_one(tmp_path, size):
    """Training over five refreshes, with inverses shared out or not, and refreshes with a bad block on one process."""
    run_processes(work, size, size, *free_ports(1), str(tmp_path))
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(size)]
    for name in SETTINGS:
        check_training(name, [rank[name] for rank in ranks])
    for name in BAD_BLOCKS:
        check_bad_block(name, [rank[name] for rank in ranks])


def check_training(name: str, ranks: list[dict]) -> None:
    """Parameters agree to rounding in float64 for uneven parts; ranks agree to the bit, in state and inverses too."""
    want, _ = train(SETTINGS[name], rank=0, size=1)
    for key, value in want.named_parameters():
        got = ranks[0]["parameters"][key]
        torch.testing.assert_close(got, value.detach(), rtol=1e-8, atol=1e-9, msg=f"{name}: {key}")
    for other in ranks[1:]:
        assert_identical(other, ranks[0], name)
    if SETTINGS[name]["structure"] == "activation_only":
        assert all(rank["blocks"] is None for rank in ranks), "every process inverts by itself"
        return
    num_shared, num_everywhere = ranks[0]["blocks"]
    balance = balances(len(ranks))[name]
    assert (num_shared > 0, num_everywhere > 0) == (balance < math.inf, balance > 0.0), name


def check_bad_block(name: str, ranks: list[dict]) -> None:
    """Raised, or failed with and without a predecessor: as in one process, though one process alone repairs it."""
    eigenvalue, num_steps = BAD_BLOCKS[name]
    want = refresh_with_a_bad_block(eigenvalue, rank=0, size=1, num_steps=num_steps)
    assert sum(one.pop("num_repaired") for one in ranks) == want["num_repaired"] == 1
    for one in ranks:
        assert_identical(one, ranks[0], name)
        assert one["message"] == want["message"]
        assert one["state"]["events"] == want["state"]["events"]
    for layer, state in want["state"]["layers"].items():
        torch.testing.assert_close(ranks[0]["state"]["layers"][layer]["inverse"], state["inverse"])
    events = {"raised": {"raised_damping:4": 1}, "kept": {"failed_inverse:4": 1}, "first": {}}
    assert want["state"]["events"] == events[name]
    assert ("cannot be inverted" in want["message"]) == (name == "first")
