"""Which passes count where processes share a mini-batch: in every mode of DistributedDataParallel, with empty parts."""

import datetime
from contextlib import nullcontext

import torch
import torch.distributed as dist
import torch.nn.functional as F
from process_group import free_ports, run_processes
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from kfac_sua.preconditioner import KroneckerPreconditioner

SIZE = 2
DTYPE = torch.float64

MODES = {
    "plain": {},
    "bucket_view": {"gradient_as_bucket_view": True},
    "static_graph": {"static_graph": True},
    "unused": {"find_unused_parameters": True},
    "micro": {"micro": 2},
    "micro_bucket_view": {"micro": 2, "gradient_as_bucket_view": True},
    "micro_no_sync": {"micro": 2, "no_sync": True},
    "zeroed": {"set_to_none": False},
    "zeroed_bucket_view": {"set_to_none": False, "gradient_as_bucket_view": True},
    "auto": {"application": "auto"},
    "auto_bucket_view": {"application": "auto", "gradient_as_bucket_view": True},
    "sampled": {"fisher_type": "mc"},
    "adversarial": {"adversarial": True},
}


def make_net() -> nn.Module:
    """Return a convolution with few rows and a linear layer."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 12, 3, bias=False), nn.Tanh(), nn.Flatten(), nn.Linear(48, 4)).to(DTYPE)


def batch(seed: int) -> tuple[Tensor, Tensor]:
    """Return a mini-batch of eight."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(8, 3, 4, 4, dtype=DTYPE, generator=generator)
    return images, torch.randint(0, 4, (8,), generator=generator)


def train(net: nn.Module, rank: int, size: int, mode: dict) -> KroneckerPreconditioner:
    """Take five steps on this process's part of each mini-batch."""
    mode = dict(mode)
    micro, no_sync, zero, adversarial = (
        mode.pop(key, default)
        for key, default in (("micro", 1), ("no_sync", False), ("set_to_none", True), ("adversarial", False))
    )
    options = {key: mode.pop(key) for key in ("application", "fisher_type") if key in mode}
    model = DistributedDataParallel(net, **mode) if size > 1 else net
    preconditioner = KroneckerPreconditioner(model, inverse_period=2, distributed=size > 1, **options)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    for index in range(5):
        optimizer.zero_grad(set_to_none=zero)
        images, labels = (part.chunk(size)[rank] for part in batch(index))
        if adversarial:
            x = images.clone().requires_grad_()
            torch.autograd.grad(F.cross_entropy(net(x), labels), x)
        parts = list(zip(images.chunk(micro), labels.chunk(micro), strict=True))
        for number, (some, some_labels) in enumerate(parts):
            with model.no_sync() if no_sync and number + 1 < len(parts) and size > 1 else nullcontext():
                outputs = model(some)
                preconditioner.fisher_backward(outputs)
                (F.cross_entropy(outputs, some_labels) / micro).backward()
        preconditioner.step()
        optimizer.step()
    return preconditioner


class Experts(nn.Module):
    """Two layers, each for the examples that are routed to it."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.head = nn.Linear(6, 8), nn.Linear(8, 4)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x: Tensor, route: Tensor) -> Tensor:
        """Return logits."""
        hidden = self.enter(x).relu()
        out = torch.zeros_like(hidden)
        for number, expert in enumerate(self.experts):
            chosen = (route == number).nonzero().flatten()
            out = out.index_add(0, chosen, expert(hidden[chosen]))
        return self.head(out)


class Tied(nn.Module):
    """Uses a weight beside its layer's calls, if it is told to."""

    def __init__(self, is_tied: bool) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 5), nn.Linear(5, 3)
        self.is_tied = is_tied

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        hidden = self.body(x).tanh()
        return self.head(hidden) + (F.linear(hidden, self.head.weight) if self.is_tied else 0)


def every_mode(rank: int) -> None:
    """Train in every mode as one process does."""
    for name, mode in MODES.items():
        net, alone = make_net(), make_net()
        events = train(net, rank, SIZE, mode).events
        assert not events, (name, events)
        train(alone, 0, 1, {key: value for key, value in mode.items() if key in ("application", "fisher_type")})
        for got, want in zip(net.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12, msg=name)


def empty_parts(rank: int) -> None:
    """An expert that is idle on one process or on both, and a process without examples."""
    torch.manual_seed(0)
    net = Experts().to(DTYPE)
    preconditioner = KroneckerPreconditioner(DistributedDataParallel(net), inverse_period=1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    for index in range(3):
        is_idle = (index == 1 and rank == 0) or index == 2
        route = torch.zeros(8, dtype=torch.long) if is_idle else torch.arange(8) % 2
        optimizer.zero_grad()
        x = torch.randn(8, 6, dtype=DTYPE)
        F.cross_entropy(net(x, route), torch.arange(8) % 4).backward()
        for parameter in net.parameters():
            dist.all_reduce(parameter.grad)
        preconditioner.step()
        optimizer.step()
    assert preconditioner.events["no_examples:experts.1"] == 1  # where no process has any
    for fisher_type in ("empirical", "mc"):
        parts = []
        for size in (SIZE, 1):
            net = make_net()
            model = DistributedDataParallel(net) if size > 1 else net
            options = {"inverse_period": 1, "distributed": size > 1, "fisher_type": fisher_type}
            preconditioner = KroneckerPreconditioner(model, **options)
            images, labels = (values[:4] for values in batch(0))
            if size > 1 and rank == 1:
                images, labels = images[:0], labels[:0]
            outputs = model(images)
            preconditioner.fisher_backward(outputs)
            (size * F.cross_entropy(outputs, labels, reduction="sum") / 4).backward()
            preconditioner.step(loss_weight=float(size))
            assert not preconditioner.events
            parts.append([parameter.grad for parameter in net.parameters()])
        for got, want in zip(*parts, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def one_odd_process(rank: int) -> None:
    """What does not add up on one process is said by all."""
    torch.manual_seed(0)
    net = Tied(is_tied=rank == 1)
    preconditioner = KroneckerPreconditioner(DistributedDataParallel(net), inverse_period=1)
    F.cross_entropy(preconditioner.model(torch.randn(8, 4)), torch.arange(8) % 3).backward()
    preconditioner.step()
    assert preconditioner.events == {"gradient_not_explained:head": 1}


def work(rank: int, port: int) -> None:
    """Do all of it, in processes that are started once."""
    store = dist.TCPStore("127.0.0.1", port, SIZE, is_master=rank == 0, timeout=datetime.timedelta(seconds=60))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=SIZE)
    try:
        for check in (every_mode, empty_parts, one_odd_process):
            check(rank)
    finally:
        dist.destroy_process_group()


def test_passes_of_several_processes_count_as_those_of_one():
    """Buckets, static graphs, unused parameters, micro-batches, empty parts and an odd process."""
    (port,) = free_ports(1)
    run_processes(work, SIZE, port)
