"""The GPUs of this machine that the user leaves to a campaign, and which of them a run gets.

CUDA is asked in processes of their own: one that has used it may hold memory of a GPU, and sees no others any more.
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
        entry: What ``CUDA_VISIBLE_DEVICES`` holds in a process that sees it alone.
        device: What it is.
    """

    entry: str
    device: CudaDevice


def find_gpus() -> tuple[Gpu, ...]:
    """Return the GPUs that CUDA shows here: those of the user's ``CUDA_VISIBLE_DEVICES`` in its order, or all.

    Each entry, be it an index, a UUID or a part of a GPU (MIG), is tried alone, so that it means what CUDA says.

    Raises:
        ConfigError: If there is none, or CUDA cannot be asked.
    """
    listed = os.environ.get(VARIABLE)
    entries = map(str, range(_asked(_count, [{}])[0])) if listed is None else listed.split(",")
    unique = list(dict.fromkeys(entry.strip() for entry in entries))
    gpus: list[Gpu] = []
    for entry, device in zip(unique, _asked(_look, [visible_alone(entry) for entry in unique]), strict=True):
        if device is None:
            break  # CUDA, too, takes no entry after one that is no GPU
        gpus.append(Gpu(entry, device))
    if not gpus:
        raise ConfigError(f"No GPU can be used by itself here ({VARIABLE}={listed or ''}); use device=cpu.")
    return tuple(gpus)


def visible_alone(entry: str | None) -> dict[str, str]:
    """Return the environment of a process that sees one GPU; without one, nothing that changes its own."""
    return {} if entry is None else {VARIABLE: entry}


def least_busy(entries: Sequence[str], busy: Iterable[str | None]) -> str | None:
    """Return the GPU for the next run: the first of those with the fewest runs.

    Args:
        entries: All GPUs; without any, the answer is None.
        busy: The GPU of each run in progress.
    """
    runs = Counter(busy)
    return min(entries, key=lambda entry: runs[entry], default=None)


def _asked(question: Callable[[Connection], None], environments: Sequence[Mapping[str, str]]) -> list[Any]:
    """Have processes answer at the same time, each in its environment."""
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
