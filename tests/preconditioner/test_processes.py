"""Two or three processes that share a mini-batch train as one process with all of it."""

import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from kfac_sua.preconditioner import KroneckerPreconditioner, KroneckerSettings

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
}
NUM_STEPS, NUM_EXAMPLES, NUM_CLASSES = 20, 11, 3  # eleven: no process count divides them


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


def train(settings: dict, rank: int, size: int) -> dict[str, torch.Tensor]:
    """Train on this process's part of every mini-batch and return the parameters."""
    net = make_net()
    model = DistributedDataParallel(net) if size > 1 else net
    preconditioner = KroneckerPreconditioner(net, settings=KroneckerSettings(inverse_period=4, **settings))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.9)
    generator = torch.Generator().manual_seed(1)
    for _ in range(NUM_STEPS):
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
    return {name: parameter.detach() for name, parameter in net.named_parameters()}


def free_port() -> int:
    """Return a TCP port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def work(rank: int, size: int, port: int, directory: str) -> None:
    """Train with every setting, one after the other, and save what the first and the last process have."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=size)
    results = {name: train(settings, rank, size) for name, settings in SETTINGS.items()}
    torch.save(results, f"{directory}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("size", [2, 3])
def test_processes_train_as_one(tmp_path, size):
    """Twenty steps over five refreshes agree to rounding in float64, for every setting and uneven parts."""
    mp.spawn(work, args=(size, free_port(), str(tmp_path)), nprocs=size)
    results = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(size)]
    for name, settings in SETTINGS.items():
        want = train(settings, rank=0, size=1)
        for parameter, value in want.items():
            torch.testing.assert_close(
                results[0][name][parameter], value, rtol=1e-8, atol=1e-9, msg=f"{name}: {parameter}"
            )
            for other in results[1:]:
                assert torch.equal(other[name][parameter], results[0][name][parameter]), (name, parameter)
