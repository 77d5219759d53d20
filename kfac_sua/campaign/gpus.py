"""The GPUs of this machine that a campaign may use, and which of them a run gets.

Processes of their own ask CUDA. A process that has used CUDA may hold memory of a GPU, and can be given no other GPUs.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch

from kfac_sua.campaign.starting import start
from kfac_sua.config import ConfigError
from kfac_sua.device import CudaDevice

VARIABLE = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True)
class Gpu:
    """A GPU.

    Attributes:
        entry: Value of ``CUDA_VISIBLE_DEVICES`` in a process that sees only this GPU.
        device: Its name, memory and precisions.
    """

    entry: str
    device: CudaDevice


def find_gpus() -> tuple[Gpu, ...]:
    """Return the GPUs that CUDA shows here: those of the user's ``CUDA_VISIBLE_DEVICES`` in its order, or all.

    Each entry (an index, a UUID or a part of a GPU by MIG) is tried alone, so that CUDA decides what it means.

    Raises:
        ConfigError: If there is none, or CUDA cannot be asked.
    """
    listed = os.environ.get(VARIABLE)
    entries = map(str, range(_asked(_count, [{}])[0])) if listed is None else listed.split(",")
    unique = list(dict.fromkeys(entry.strip() for entry in entries))
    gpus: list[Gpu] = []
    for entry, device in zip(unique, _asked(_look, [visible_alone(entry) for entry in unique]), strict=True):
        if device is None:
            break  # CUDA also ignores all entries after one that is no GPU
        gpus.append(Gpu(entry, device))
    if not gpus:
        raise ConfigError(f"No GPU can be used by itself here ({VARIABLE}={listed or ''}); use device=cpu.")
    return tuple(gpus)


def visible_alone(entry: str | None) -> dict[str, str]:
    """Return the variables for a process that sees one GPU; for None, no variables."""
    return {} if entry is None else {VARIABLE: entry}


def least_busy(entries: Sequence[str], busy: Iterable[str | None]) -> str | None:
    """Return the GPU for the next run: the first of those with the fewest runs; None if there is no GPU.

    Args:
        entries: All GPUs.
        busy: The GPU of each run in progress.
    """
    runs = Counter(busy)
    return min(entries, key=lambda entry: runs[entry], default=None)


def _asked(question: Callable[[Connection], None], environments: Sequence[Mapping[str, str]]) -> list[Any]:
    """Return the answers of processes that run at the same time, each in its environment."""
    asked = [start(question, environment) for environment in environments]
    answers = []
    for process, connection in asked:
        try:
            answers.append(connection.recv())
        except (EOFError, ConnectionResetError) as error:
            process.join()
            raise ConfigError(
                f"CUDA does not say which GPUs there are: asked, a process left with {process.exitcode}."
            ) from error
        process.join()
        connection.close()
    return answers


def _count(connection: Connection) -> None:
    connection.send(torch.cuda.device_count() if torch.cuda.is_available() else 0)


def _look(connection: Connection) -> None:
    is_alone = torch.cuda.is_available() and torch.cuda.device_count() == 1
    connection.send(CudaDevice.current() if is_alone else None)
