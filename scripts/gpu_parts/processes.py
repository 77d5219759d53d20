"""Steps of some processes that share mini-batches on one device, compared with one process alone.

``python scripts/gpu_parts/processes.py --backend gloo --processes 2 --device cuda``: all processes on the same card,
which the training command refuses, as it is slower than one process. Exit code 1 if the parameters differ by more than
rounding.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take seconds
    from kfac_sua.startup import begin

    begin()

import argparse
import gc
import multiprocessing
import sys
import tempfile
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from kfac_sua import KroneckerPreconditioner
from kfac_sua.config import Precision
from kfac_sua.startup import run_command
from kfac_sua.training.precision import computing_in

PATIENCE = timedelta(seconds=20)
TOLERANCE = 1e-3
"""Of the difference, relative to the way that the parameters have come."""

BATCH_SIZE = 101  # uneven parts


def main() -> None:
    """Start the processes, and let them compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=["nccl", "gloo"], required=True, help="what the processes talk by")
    parser.add_argument("--processes", type=int, required=True, help="how many")
    parser.add_argument("--device", choices=["cpu", "cuda"], required=True, help="of all of them")
    parser.add_argument("--steps", type=int, default=20, help="of each (default: %(default)s)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        arguments = (options, f"file://{Path(directory) / 'meeting'}")
        if options.processes == 1:
            work(0, *arguments)
        else:
            # Imports once, in the process that forks the others, which has not used the GPU.
            multiprocessing.set_forkserver_preload(["kfac_sua", "torch.distributed"])
            mp.start_processes(work, args=arguments, nprocs=options.processes, start_method="forkserver")


def work(rank: int, options: argparse.Namespace, meeting: str) -> None:
    """Train as one of the processes; the first one then trains alone and compares."""
    device = torch.device(options.device, 0) if options.device == "cuda" else torch.device("cpu")
    with computing_in(Precision.float32, device):
        size = options.processes
        dist.init_process_group(options.backend, init_method=meeting, rank=rank, world_size=size, timeout=PATIENCE)
        together = train(options.steps, device, rank, size)
        gc.collect()  # what still refers to the group would outlive its threads
        dist.destroy_process_group()
        if rank == 0:
            compare(together, train(options.steps, device), train(0, device))


def train(steps: int, device: torch.device, rank: int = 0, size: int = 0) -> Tensor:
    """Return all parameters after some steps, ``[num_parameters]``.

    Args:
        steps: How many.
        device: Where to compute.
        rank: Number of this process.
        size: Processes that share each mini-batch; 0 for one that knows of no group.
    """
    torch.manual_seed(0)  # the same weights and images everywhere
    net = nn.Sequential(
        *(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(1024, 10)),
    )
    images, labels = torch.randn(BATCH_SIZE, 3, 16, 16), torch.randint(0, 10, (BATCH_SIZE,))
    net, images, labels = net.to(device), images.to(device), labels.to(device)
    model = DistributedDataParallel(net) if size else net
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    preconditioner = KroneckerPreconditioner(net, structure="sua", damping=0.1, inverse_period=5, distributed=size > 0)
    part = slice(None) if size == 0 else torch.arange(BATCH_SIZE).tensor_split(size)[rank]
    weight = max(1, size) * len(labels[part]) / BATCH_SIZE  # averages over processes become means over images
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images[part]), labels[part])
        (loss * weight).backward()
        preconditioner.step(loss_weight=weight)
        optimizer.step()
    if steps and rank == 0:
        print(
            f"{'together' if size else 'alone'}: {steps} steps, loss of process 0 {float(loss.detach()):.6f}",
            flush=True,
        )
    return nn.utils.parameters_to_vector(net.parameters()).detach()


def compare(together: Tensor, alone: Tensor, start: Tensor) -> None:
    """Print how far the two have come apart, and end with code 1 if that is more than rounding."""
    difference = float((together - alone).norm() / (alone - start).norm())
    print(f"largest difference {float((together - alone).abs().max()):.3g}, {difference:.3g} of the way", flush=True)
    if not difference <= TOLERANCE:
        sys.exit(f"The parameters differ by {difference:.3g} of the way; {TOLERANCE:g} is rounding.")


if __name__ == "__main__":
    run_command(main)
