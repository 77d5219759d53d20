"""Which GPUs a campaign uses, how many runs at a time, which run gets which, and the words for it."""

import dataclasses
import os
import time
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from campaign.test_pool import carry_out, make_cell

from kfac_sua import reproduce
from kfac_sua.campaign import engine, gpus, pool
from kfac_sua.campaign.engine import Workers
from kfac_sua.campaign.gpus import VARIABLE, Gpu, find_gpus, least_busy
from kfac_sua.config import ConfigError, Precision
from kfac_sua.device import CudaDevice

NEW = CudaDevice("New Card", frozenset(Precision) - {Precision.auto})
OTHER = CudaDevice("Other Card", NEW.precisions)
OLD = CudaDevice("Old Card", frozenset({Precision.float32}))
WORK_TIME_S = 0.3


def send_three(connection: Connection) -> None:
    """Say how many GPUs there are, as CUDA would."""
    connection.send(3)


def send_device(connection: Connection) -> None:
    """Say what CUDA would make of a list with one entry on a machine with three GPUs, one of them in parts."""
    entry = os.environ[VARIABLE]
    connection.send(NEW if entry in ("0", "1", "2") or entry.startswith(("GPU-", "MIG-")) else None)


def note_gpu(connection: Connection) -> None:
    """Work as a process of a campaign would, and note on which GPU, and from when to when."""
    while True:
        try:
            task = connection.recv()
        except EOFError:
            return
        started = time.monotonic()
        time.sleep(WORK_TIME_S)
        task.log.parent.mkdir(parents=True)
        line = f"{os.environ.get(VARIABLE)} {torch.cuda.is_initialized()} {started} {time.monotonic()} {os.getpid()}"
        task.log.write_text(line)
        connection.send(None)


def make_gpus(*devices: CudaDevice) -> tuple[Gpu, ...]:
    """Return GPUs with indices as their entries."""
    return tuple(Gpu(str(index), device) for index, device in enumerate(devices))


@pytest.mark.parametrize(
    ("listed", "entries"),
    [
        (None, ["0", "1", "2"]),
        ("2,0", ["2", "0"]),
        (" 1 , 1", ["1"]),
        ("GPU-8f,MIG-3c", ["GPU-8f", "MIG-3c"]),
        ("0,-1,1", ["0"]),
        ("", []),
        ("NoDevFiles", []),
    ],
)
def test_each_entry_of_the_users_list_is_a_gpu(monkeypatch, listed, entries):
    """In its order, up to the first that is none, as CUDA takes it; none at all is a sentence."""
    monkeypatch.setattr(gpus, "_count", send_three)
    monkeypatch.setattr(gpus, "_look", send_device)
    monkeypatch.delenv(VARIABLE, raising=False)
    if listed is not None:
        monkeypatch.setenv(VARIABLE, listed)
    if entries:
        assert find_gpus() == tuple(Gpu(entry, NEW) for entry in entries)
    else:
        with pytest.raises(ConfigError, match=rf"^No GPU can be used by itself here \({VARIABLE}={listed}\); use dev"):
            find_gpus()


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
@pytest.mark.parametrize("listed", [None, "0"])
def test_without_a_gpu_there_is_a_sentence(monkeypatch, listed):
    """What is asked is the real CUDA, if there is one."""
    monkeypatch.delenv(VARIABLE, raising=False)
    if listed is not None:
        monkeypatch.setenv(VARIABLE, listed)
    with pytest.raises(ConfigError, match=r"^No GPU can be used"):
        find_gpus()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_every_gpu_is_found_and_works_alone():
    """As many as this process sees, with their names."""
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    assert [gpu.device.name for gpu in find_gpus()] == names


def test_the_least_busy_gpu_is_next():
    """The first of several; and none where there is none."""
    assert least_busy(["a", "b", "c"], []) == "a"
    assert least_busy(["a", "b", "c"], ["a", "c"]) == "b"
    assert least_busy(["a", "b", "c"], ["a", "a", "b", "c", "c"]) == "b"
    assert least_busy([], [None, None]) is None


@pytest.mark.parametrize(("jobs", "reuse", "most"), [(4, True, 2), (3, True, 2), (2, False, 1)])
def test_every_process_sees_one_gpu_and_none_has_more_runs_than_its_share(tmp_path, monkeypatch, jobs, reuse, most):
    """Set before CUDA is used, the same for all runs of a process; final runs, one per GPU, are alone on theirs."""
    monkeypatch.setattr(pool, "work", note_gpu)
    cells = [make_cell(tmp_path, lr) for lr in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)]
    entries = ["3", "GPU-8f"]
    assert set(carry_out(cells, jobs=jobs, reuse=reuse, gpus=entries).values()) == {None}
    notes = [path.read_text().split() for path in tmp_path.rglob("log.txt")]
    assert len(notes) == len(cells)
    assert {note[0] for note in notes} == set(entries)
    assert {note[1] for note in notes} == {"False"}
    spans = [(entry, float(start), float(end)) for entry, _, start, end, _ in notes]
    at_once = [Counter(entry for entry, start, end in spans if start <= instant < end) for _, instant, _ in spans]
    assert max(max(counts.values()) for counts in at_once) <= most
    gpu_of = {pid: entry for entry, *_, pid in notes}
    assert all(gpu_of[pid] == entry for entry, *_, pid in notes)
    assert len(gpu_of) <= jobs + 1 if reuse else len(gpu_of) == len(cells)


def test_on_a_cpu_processes_see_what_this_one_sees(tmp_path, monkeypatch):
    """The user's list is nobody else's business."""
    monkeypatch.setattr(pool, "work", note_gpu)
    monkeypatch.setenv(VARIABLE, "7,8")
    carry_out([make_cell(tmp_path, 0.1)])
    assert next(tmp_path.rglob("log.txt")).read_text().startswith("7,8 ")


@pytest.mark.parametrize(
    ("devices", "cores", "jobs", "grid", "final"),
    [
        ([NEW] * 4, 64, None, "5 at a time on each of 4 GPUs", "one at a time on each of 4 GPUs"),
        ([NEW] * 4, 64, 2, "2 at a time on 4 GPU(s)", "one at a time on each of 4 GPUs"),
        ([NEW] * 4, 64, 4, "1 at a time on each of 4 GPUs", "one at a time on each of 4 GPUs"),
        ([NEW] * 4, 6, None, "6 at a time on 4 GPU(s)", "one at a time on each of 4 GPUs"),
        ([NEW] * 4, 3, None, "3 at a time on 4 GPU(s)", "one at a time on each of 3 GPUs"),
        ([NEW], 64, None, "5 at a time on 1 GPU(s)", "alone on the device"),
        ([NEW, OTHER], 64, None, "5 at a time on each of 2 GPUs", "alone on the device"),
        ([NEW, OLD, NEW], 64, None, "5 at a time on each of 2 GPUs", "one at a time on each of 2 GPUs"),
        ([], 6, None, "6 at a time", "alone on the device"),
        ([], 6, 2, "2 at a time", "alone on the device"),
    ],
)
def test_runs_at_a_time_follow_from_gpus_cores_and_the_user(monkeypatch, devices, cores, jobs, grid, final):
    """Five per GPU, a core each; --jobs counts those of all GPUs."""
    monkeypatch.setattr(engine, "num_cores", lambda: cores)
    workers = Workers.sharing(make_gpus(*devices), jobs)
    assert (workers.how(is_final=False), workers.how(is_final=True)) == (grid, final)


@pytest.mark.parametrize(
    ("devices", "cores", "description"),
    [
        ([], 6, ""),
        ([NEW, NEW], 64, "GPUs: 2 × New Card"),
        ([NEW, NEW], 6, "GPUs: 2 × New Card; 6 cores bound the runs of the grid, as each needs one"),
        (
            [NEW, OTHER],
            64,
            "GPUs: 1 × New Card, 1 × Other Card; final runs, whose seconds are compared, on 1 × New Card",
        ),
        (
            [NEW, OLD],
            64,
            "GPUs: 1 × New Card, 1 × Old Card; grid on 1 × New Card, as the others have other precisions; "
            "final runs, whose seconds are compared, on 1 × New Card",
        ),
    ],
)
def test_what_bounds_runs_and_which_gpus_are_left_out_is_said(monkeypatch, devices, cores, description):
    """Seconds are compared on one kind, and a run's directory is that of one precision."""
    monkeypatch.setattr(engine, "num_cores", lambda: cores)
    assert Workers.sharing(make_gpus(*devices)).description == description


def test_a_campaign_says_who_runs_what_and_leaves_cuda_to_its_processes(tmp_path, monkeypatch, capsys):
    """What is found in another process decides on precisions and directories; this one never uses CUDA."""

    def refuse() -> None:
        raise AssertionError("the campaign's own process uses CUDA")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "_lazy_init", refuse)
    monkeypatch.setattr(engine, "num_cores", lambda: 64)
    out = ["--out", str(tmp_path / "out"), "--only", "sua"]
    for device, precision in ((NEW, "tf32"), (OLD, "float32")):
        monkeypatch.setattr(reproduce, "find_gpus", lambda device=device: make_gpus(*[device] * 4))
        assert reproduce.main(["fig1", "--scale", "smoke", "--dry-run", *out, "device=cuda"]) == 0
        shown = capsys.readouterr().out
        assert f"GPUs: 4 × {device.name}\n" in shown
        assert " to do, 5 at a time on each of 4 GPUs: " in shown
        assert " to do, one at a time on each of 4 GPUs: " in shown
        arguments = ["fig1", "--scale", "smoke", "--dry-run", *out, "device=cuda", "precision=tf32"]
        assert reproduce.main(arguments) == (0 if precision == "tf32" else 2)
        capsys.readouterr()
    assert not Path(out[1]).exists()


@pytest.mark.parametrize(("memory_gib", "jobs"), [((139,), 5), ((40, 40), 10), ((16, 24), 2 + 3), ((4,), 1)])
def test_memory_bounds_the_runs_on_a_gpu(memory_gib, jobs, monkeypatch):
    """8 GiB each, one run on the smallest GPU; who is bounded by it is told."""
    monkeypatch.setattr(engine, "num_cores", lambda: 64)
    workers = Workers.sharing(make_gpus(*(dataclasses.replace(NEW, memory_gib=memory) for memory in memory_gib)))
    assert workers.jobs == jobs
    assert ("runs of the grid are left 8 GiB each" in workers.description) == (min(memory_gib) < 40)
