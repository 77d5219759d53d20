"""Several processes of this machine that work together, started as cheaply as tests need it."""

import multiprocessing
import socket
from collections.abc import Callable
from typing import Any

import torch.multiprocessing as mp

# Imported once, in the process that forks the others before it has threads of its own: a second or two for each saved.
_PRELOADED = ("kfac_sua.training.loop", "torch.distributed")


def run_processes(work: Callable[..., None], size: int, *arguments: Any) -> None:
    """Call ``work(rank, *arguments)`` in so many processes, and raise what one of them raises."""
    multiprocessing.set_forkserver_preload(list(_PRELOADED))
    mp.start_processes(work, args=arguments, nprocs=size, start_method="forkserver")


def free_ports(count: int) -> list[int]:
    """Return TCP ports that nobody listens on."""
    listeners = [socket.socket() for _ in range(count)]
    try:
        for listener in listeners:
            listener.bind(("127.0.0.1", 0))
        return [int(listener.getsockname()[1]) for listener in listeners]
    finally:
        for listener in listeners:
            listener.close()
