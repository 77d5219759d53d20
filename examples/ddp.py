"""Several processes share every mini-batch: ``torchrun --standalone --nproc_per_node=2 examples/ddp.py``.

On the CPU, by gloo. Any number of processes trains as one process does, to rounding: the statistics are averaged over
the processes like the gradients.
"""

import gc
import os
import sys

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from kfac_sua import KroneckerPreconditioner


def train(rank: int, num_processes: int) -> None:
    """Train three epochs on this process's parts of the mini-batches."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16  # [1797, 1, 8, 8]
    labels = torch.tensor(digits.target)

    torch.manual_seed(0)  # the same weights and the same order of images everywhere
    net = nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(128, 10)),
    )
    model = DistributedDataParallel(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.03, momentum=0.9)
    # After init_process_group: the preconditioner looks for the processes when it is made.
    preconditioner = KroneckerPreconditioner(net, structure="sua", damping=0.1, inverse_period=10)

    for epoch in range(3):
        total = torch.zeros(())
        for batch in torch.randperm(len(images)).split(101):  # 101, and 80 at the end: uneven parts
            part = batch.tensor_split(num_processes)[rank]
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(images[part]), labels[part])
            # The gradients are averaged over processes; this weight makes that the mean over all examples.
            weight = num_processes * len(part) / len(batch)
            (loss * weight).backward()
            preconditioner.step(loss_weight=weight)
            optimizer.step()
            total += loss.detach() * len(part)
        dist.all_reduce(total)
        if rank == 0:
            print(f"epoch {epoch + 1}: loss {total / len(images):.5f}, {num_processes} processes", flush=True)


def main() -> None:
    """Join the other processes, train, and leave them."""
    if "RANK" not in os.environ:
        sys.exit("Start this with torchrun --standalone --nproc_per_node=2 examples/ddp.py.")
    dist.init_process_group("gloo")
    train(dist.get_rank(), dist.get_world_size())
    # Model and preconditioner, which know the group, are gone by now: its threads can end before Python does.
    gc.collect()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
