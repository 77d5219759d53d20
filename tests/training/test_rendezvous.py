"""Processes that do not belong to one run: all of them leave at once, with what differs."""

import dataclasses
import json
import os
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from process_group import free_ports, run_processes

from kfac_sua.compose import compose_config
from kfac_sua.config import ConfigError
from kfac_sua.runs import environment
from kfac_sua.training import rendezvous as rendezvous_module
from kfac_sua.training.connection import TIMEOUT
from kfac_sua.training.launch import Launch
from kfac_sua.training.rendezvous import Rendezvous, open_rendezvous

TINY = ("model=tiny", "dataset=digits", "dataset.train_size=200", "device=cpu", "epochs=1")
# What process 1 is given that process 0 is not -> what both say of it.
DIFFERENT = {
    "optimizer.lr=0.2": "optimizer.lr is 0.03 in process 0 and 0.2 in process 1",
    "seed=3": "seed is 0 in process 0 and 3 in process 1",
    "preconditioner.damping=0.5": "preconditioner.damping is 0.1 in process 0 and 0.5 in process 1",
    "dataset.split_seed=1": "dataset.split_seed is 0 in process 0 and 1 in process 1",
    "device=auto": "device is 'cpu' in process 0 and 'auto' in process 1",
    "log_interval=1": "log_interval is null in process 0 and 1 in process 1",  # what all have to ask for together
    "preconditioner=baseline": "more differences",
}
# What decides no numbers: one machine may keep its data elsewhere, or have another number of cores.
ALIKE = "dataset.data_dir=/elsewhere num_threads=2 progress=none output_dir=elsewhere checkpoint_interval_s=5"
LEFT_WITHIN_S = TIMEOUT.total_seconds() / 5  # no waiting for others; a loaded machine is slow by itself


def meet(rank: int, size: int, ports: dict[str, int], directory: str) -> None:
    """Write down what a process hears in one rendezvous after the other."""
    heard = {}
    for difference, port in ports.items():
        own = difference.split() if rank == 1 else []
        config = compose_config([*TINY, *own])
        before = time.monotonic()
        try:
            with open_rendezvous(Launch(rank, size, rank, "127.0.0.1", port)) as rendezvous:
                rendezvous.require_one_run(config)
            heard[difference] = "alike"
        except ConfigError as error:
            heard[difference] = str(error)
        assert time.monotonic() - before < LEFT_WITHIN_S
    Path(directory, f"{rank}.json").write_text(json.dumps(heard))


def test_processes_that_differ_in_anything_that_decides_numbers_are_refused_on_all(tmp_path):
    """Learning rate, seed, damping, split, device, structure: both say what differs; where files lie may differ."""
    ports = dict(zip([*DIFFERENT, ALIKE], free_ports(len(DIFFERENT) + 1), strict=True))
    run_processes(meet, 2, 2, ports, str(tmp_path))
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second
    for difference, sentence in DIFFERENT.items():
        assert first[difference].startswith("The 2 processes of a run must carry out the same one: ")
        assert sentence in first[difference]
    assert first[ALIKE] == "alike"


def find_device(rank: int, size: int, ports: list[int], directory: str) -> None:
    """Write down what a process hears of devices, of another code, and of a run to start from that one cannot read."""
    heard = []

    def choose() -> torch.device:
        if rank == 1 and len(heard) == 1:
            raise ConfigError("device=cuda, but there is none.")
        return torch.device("meta" if rank == 1 and not heard else "cpu")

    for port in ports:
        try:
            with open_rendezvous(Launch(rank, size, rank, "127.0.0.1", port)) as rendezvous:
                if len(heard) == 3:
                    rendezvous_module.source_digest = lambda: f"changed in {rank}"
                elsewhere = "/nowhere" if rank == 1 and len(heard) == 4 else None
                rendezvous.require_one_run(dataclasses.replace(compose_config(list(TINY)), start_from=elsewhere))
                heard.append(rendezvous.choose_device(choose).type)
        except ConfigError as error:
            heard.append(str(error))
    Path(directory, f"{rank}.json").write_text(json.dumps(heard))


def test_what_one_process_lacks_or_has_otherwise_is_refused_on_all(tmp_path):
    """No device, one of another kind, another source, no run to start from: on one, it ends all."""
    run_processes(find_device, 2, 2, free_ports(5), str(tmp_path))
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert "cpu in process 0 and meta in process 1" in first[0]
    assert "meta in process 1 and cpu in process 0" in second[0]
    assert first[1] == "process 1 of 2 cannot take part: device=cuda, but there is none."
    assert second[1] == "device=cuda, but there is none."
    assert first[2] == second[2] == "cpu"
    assert first[3] == second[3]
    assert "the source of kfac_sua is 'changed in 0' in process 0 and 'changed in 1' in process 1" in first[3]
    assert second[4].startswith("start_from=/nowhere is not the directory of a run: ")
    assert first[4] == f"process 1 of 2 cannot take part: {second[4]}"


def count_each_other(rank: int, sizes: dict[int, list[int]], directory: str) -> None:
    """Write down what a process hears of the numbers of processes that it and others were told."""
    rendezvous_module._READ_TIMEOUT = timedelta(seconds=3)  # nobody else comes, and a busy machine is slow to read
    heard = []
    for port, told in sizes.items():
        before = time.monotonic()
        try:
            with open_rendezvous(Launch(rank, told[rank], rank, "127.0.0.1", port)):
                heard.append("alike")
        except ConfigError as error:
            heard.append(str(error).split(": ")[1])
        assert time.monotonic() - before < LEFT_WITHIN_S
    Path(directory, f"{rank}.json").write_text(json.dumps(heard))


def test_processes_that_were_told_different_numbers_of_processes_leave_at_once(tmp_path):
    """Nobody waits for a process that only some believe in, whether the first one or others believe in it."""
    sizes = dict(zip(free_ports(3), ([2, 3], [3, 2], [2, 2]), strict=True))
    run_processes(count_each_other, 2, sizes, str(tmp_path))
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    both = [
        f"it is {own} in process 0 and {other} in process 1; give all the same WORLD_SIZE."
        for own, other in ((2, 3), (3, 2))
    ]
    assert first == second == [*both, "alike"]


def test_two_processes_of_one_number_are_refused():
    """A store in which a number is taken already: of two runs at one port, or of two processes of one rank."""
    rendezvous = Rendezvous(Launch(1, 2, 1, "node1", 29500), dist.HashStore())
    assert rendezvous.store.add("values/1/claims", 1) == 1
    with pytest.raises(ConfigError, match="Two processes say that they are number 1 of 2 at node1:29500; give"):
        rendezvous.require_one_run(compose_config(list(TINY)))


def test_a_port_in_use_is_named():
    """Another program listens there: a sentence, not what the store prints."""
    with socket.socket() as other:
        other.bind(("0.0.0.0", 0))
        other.listen()
        port = other.getsockname()[1]
        launch = Launch(0, 2, 0, "127.0.0.1", port)
        with (
            pytest.raises(ConfigError, match=f"Port {port} of this machine, at which .* in use"),
            open_rendezvous(launch),
        ):
            pass


def test_the_digest_of_the_source_sees_every_file(tmp_path, monkeypatch):
    """A changed line, another name and a new file are other sources."""
    package = tmp_path / "package"
    (package / "runs").mkdir(parents=True)
    monkeypatch.setattr(environment, "__file__", str(package / "runs/environment.py"))
    (package / "a.py").write_text("x = 1\n")
    digests = {environment.source_digest()}
    (package / "a.py").write_text("x = 2\n")
    digests.add(environment.source_digest())
    (package / "a.py").rename(package / "b.py")
    digests.add(environment.source_digest())
    (package / "a.py").write_text("")
    digests.add(environment.source_digest())
    assert len(digests) == 4


def start(rank: int, port: int, directory: Path, *arguments: str) -> subprocess.Popen[str]:
    """Start one of two processes of a run by hand, in a directory of its own."""
    place = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}
    return subprocess.Popen(
        [sys.executable, "-m", "kfac_sua.train", *arguments],
        cwd=directory,
        env=os.environ | place | {"MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_two_commands_that_differ_end_with_a_sentence_each_and_leave_nothing(tmp_path):
    """Real processes: exit code 2 on both, nothing on disk."""
    (port,) = free_ports(1)
    both = [start(rank, port, tmp_path, *TINY, f"optimizer.lr=0.0{rank + 1}") for rank in range(2)]
    for rank, process in enumerate(both):
        out, err = process.communicate(timeout=60)
        assert (process.returncode, out) == (2, "")
        assert err == (
            f"process {rank} of 2: The 2 processes of a run must carry out the same one: optimizer.lr is 0.01 in "
            "process 0 and 0.02 in process 1.\n"
        )
    assert list(tmp_path.iterdir()) == []


def archive(directory: Path, first_pixel: int) -> Path:
    """Write images in the form of CIFAR-10, one pixel of which is given."""
    images = np.random.default_rng(0).integers(0, 256, (2, 200, 32, 32, 3), dtype=np.uint8)
    labels = np.arange(200, dtype=np.int64) % 10
    arrays = {"train_images": images[0], "test_images": images[1], "train_labels": labels, "test_labels": labels}
    arrays["train_images"][0, 0, 0, 0] = first_pixel
    directory.mkdir()
    np.savez(directory / "cifar10.npz", classes=np.array([f"c{number}" for number in range(10)]), **arrays)
    return directory


@pytest.mark.slow
def test_other_images_are_refused_on_both(tmp_path):
    """One pixel of one image differs between the machines."""
    (port,) = free_ports(1)
    arguments = (*TINY[:1], "dataset=cifar10", "dataset.validation_size=50", "device=cpu", "epochs=1")
    both = []
    for rank in range(2):
        data = archive(tmp_path / f"data{rank}", rank)
        both.append(start(rank, port, tmp_path, *arguments, f"dataset.data_dir={data}"))
    for process in both:
        _, err = process.communicate(timeout=60)
        assert process.returncode == 2
        assert "differ between process 0 and process 1; give all the same files." in err
    assert not list(tmp_path.rglob("run.json"))
