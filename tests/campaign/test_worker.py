"""What a process of a campaign leaves behind after each run, and that its numbers are those of the command."""

import gc
import subprocess
import sys
import weakref
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from campaign.test_pool import ROOT, carry_out, make_cell
from tiny_runs import TINY, metrics_without_times, tiny_config

from kfac_sua.campaign.starting import start
from kfac_sua.campaign.worker import Task, run_into_log
from kfac_sua.training import loop
from kfac_sua.training.state import Training

SETTINGS = ("preconditioner=sua", "preconditioner.inverse_period=3", "epochs=2")


def carry_out_three(connection: Connection, root: Path, device: str) -> None:
    """Carry out three runs in one process; after each, send what is left of it."""
    networks: list[weakref.ref[torch.nn.Module]] = []
    original = loop.build_training

    def remembering(*arguments, **options) -> Training:
        training = original(*arguments, **options)
        networks.append(weakref.ref(training.model))
        training.model.itself = [training.model]  # a circle, as exceptions and their frames make
        return training

    gc.disable()  # what is collected is what the run's end has collected
    loop.build_training = remembering
    for seed in range(3):
        config = tiny_config(root, *SETTINGS, f"device={device}", f"seed={seed}")
        reason = run_into_log(Task(config, root / f"{seed}.txt", 1))
        num_tensors = sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())
        num_networks = sum(network() is not None for network in networks)
        connection.send((reason, len(networks), num_networks, num_tensors, torch.cuda.memory_allocated()))


def what_is_left(root: Path, device: str) -> list[tuple[str | None, int, int, int, int]]:
    """Return what is left after each of three runs of a process."""
    process, connection = start(partial(carry_out_three, root=root, device=device))
    left = [connection.recv() for _ in range(3)]
    process.join()
    return left


def test_nothing_of_a_run_is_left_when_the_next_begins(tmp_path):
    """No network is alive, and there are no more tensors after the third run than after the first."""
    left = what_is_left(tmp_path, "cpu")
    assert [reason for reason, *_ in left] == [None] * 3
    assert [(begun, alive) for _, begun, alive, *_ in left] == [(1, 0), (2, 0), (3, 0)]
    assert len({num_tensors for *_, num_tensors, _ in left}) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_memory_of_a_gpu_comes_back(tmp_path):
    """Graphs, their pools and what cuBLAS works in; some small indices are kept for the next run."""
    left = what_is_left(tmp_path, "cuda")
    assert [reason for reason, *_ in left] == [None] * 3
    assert all(num_bytes < 2**20 for *_, num_bytes in left)
    assert len({num_bytes for *_, num_bytes in left}) == 1


@pytest.mark.slow
def test_the_numbers_are_those_of_the_command(tmp_path):
    """A run in a copied process, the second there too, and one of ``python -m kfac_sua.train``: to the last digit."""
    settings = ("preconditioner=sua", "preconditioner.inverse_period=3", "epochs=2")
    cells = [make_cell(tmp_path / "campaign", lr, *settings) for lr in (0.1, 0.05)]
    assert set(carry_out(cells, jobs=1).values()) == {None}
    for cell, lr in zip(cells, (0.1, 0.05), strict=True):
        arguments = [*TINY, *settings, f"optimizer.lr={lr}", f"output_dir={tmp_path / 'command'}"]
        subprocess.run([sys.executable, "-m", "kfac_sua.train", *arguments], cwd=ROOT, capture_output=True, check=True)
        alone = tiny_config(tmp_path / "command", *settings, f"optimizer.lr={lr}")
        assert metrics_without_times(cell.config) == metrics_without_times(alone)
