"""deterministic=true: PyTorch's switches, what cuBLAS needs before its first use, and that both end with the run."""

import os
import subprocess
import sys

import pytest
import torch
import torch.utils.deterministic
from tiny_runs import directory_of, metrics_without_times, tiny_config

from kfac_sua.config import ConfigError
from kfac_sua.runs.directory import run_directory
from kfac_sua.training import capturing, loop
from kfac_sua.training.determinism import CUBLAS_VARIABLE, determinism
from kfac_sua.training.loop import run

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def switches() -> tuple[bool, bool, bool]:
    """Return what is in force."""
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
    )


@pytest.mark.parametrize("before", [(False, False), (True, True)])
def test_switches_are_on_inside_and_come_back(monkeypatch, before):
    """Errors rather than warnings, and new tensors are not filled; also after an exception."""
    monkeypatch.setenv(CUBLAS_VARIABLE, ":16:8")
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    outside = switches()
    try:
        for device in (CPU, CUDA):
            with determinism(True, device):
                assert switches() == (True, False, False)
            with pytest.raises(KeyboardInterrupt), determinism(True, device):
                raise KeyboardInterrupt
            assert switches() == outside
        with determinism(False, CPU):
            assert switches() == outside
    finally:
        torch.use_deterministic_algorithms(False)
    assert os.environ[CUBLAS_VARIABLE] == ":16:8"  # the user's, which is as good


def test_cublas_is_told_before_its_first_use(monkeypatch):
    """On a GPU only; a process that has used it already cannot be made deterministic any more, and says so."""
    monkeypatch.delenv(CUBLAS_VARIABLE, raising=False)
    with determinism(True, CPU):
        assert CUBLAS_VARIABLE not in os.environ
    used = fake_gpu(monkeypatch)
    used["allocation.all.allocated"] = 1
    with (
        pytest.raises(ConfigError, match=r"needs CUBLAS_WORKSPACE_CONFIG=:4096:8 .* a command of their own\.$"),
        determinism(True, CUDA),
    ):
        pytest.fail("went on")
    used["allocation.all.allocated"] = 0  # its name was asked for, no more
    with determinism(True, CUDA):
        assert os.environ[CUBLAS_VARIABLE] == ":4096:8"
    used["allocation.all.allocated"] = 1
    with determinism(True, CUDA):  # a second run of a sweep
        pass
    monkeypatch.setenv(CUBLAS_VARIABLE, ":4096:2:16:8")
    with pytest.raises(ConfigError), determinism(True, CUDA):
        pytest.fail("went on")


def fake_gpu(monkeypatch) -> dict[str, int]:
    """Pretend that there is a GPU that this process has asked for its properties; return its count of allocations."""
    stats: dict[str, int] = {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_tf32_supported", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda index: stats)
    return stats


def test_a_run_on_a_gpu_tells_cublas_before_anything_is_on_it(tmp_path, monkeypatch):
    """Choosing the device, the precision and the directory comes before, and does not count as a use."""
    monkeypatch.delenv(CUBLAS_VARIABLE, raising=False)
    fake_gpu(monkeypatch)
    config = tiny_config(tmp_path, "device=cuda", "deterministic=true")
    run_directory(config, "cuda")  # as a campaign does

    def start(config, device, process_group):
        raise InterruptedError(f"{device.type} {config.precision} {os.environ[CUBLAS_VARIABLE]}")

    monkeypatch.setattr(loop, "build_training", start)
    with pytest.raises(InterruptedError, match=r"^cuda tf32 :4096:8$"):
        run(config)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_command_sets_what_cublas_needs_by_itself(tmp_path):
    """In a process of its own, without a variable in the environment."""
    environment = {name: value for name, value in os.environ.items() if name != CUBLAS_VARIABLE}
    keys = ["model=tiny", "dataset=digits", "dataset.train_size=400", "epochs=1", "deterministic=true", "device=cuda"]
    command = [sys.executable, "-m", "kfac_sua.train", *keys, f"output_dir={tmp_path}"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, ended.stderr


def test_a_run_is_deterministic_while_it_trains(tmp_path, monkeypatch):
    """The switches are on in its steps, in a directory of its own; on a CPU the numbers are those of without."""
    seen, take_step = [], capturing.take_step
    monkeypatch.setattr(capturing, "take_step", lambda training: (seen.append(switches()), take_step(training))[1])
    configs = [tiny_config(tmp_path, "epochs=1", f"deterministic={flag}") for flag in ("true", "false")]
    for config in configs:
        assert run(config).status == "finished"
    assert seen == [(True, False, False)] * 4 + [(False, False, True)] * 4
    assert directory_of(configs[0]) != directory_of(configs[1])
    assert metrics_without_times(configs[0]) == metrics_without_times(configs[1])
