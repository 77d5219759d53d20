"""Two or three processes carry out a run as one process does, and hand it on to any other number of them."""

import copy
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from shared_runs import (
    QUICK,
    SETTINGS,
    all_settings,
    carry_out,
    in_float64,
    shared_config,
    stopping_setting,
)
from tiny_runs import directory_of, metrics_without_times
from torch import Tensor, nn

from kfac_sua.runs.run_info import read_run_info
from kfac_sua.training.checkpoint import load_checkpoint
from kfac_sua.training.process_group import ProcessGroup

SLOW = {size: tuple(name for name in all_settings() if name not in QUICK[size]) for size in QUICK}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Return a directory with some runs of two and of three processes; the resumed one is begun by two."""
    root = tmp_path_factory.mktemp("shared")
    for size, names in QUICK.items():
        carry_out(root, size, names)
    return root


@pytest.fixture(scope="module")
def other_root(tmp_path_factory) -> Path:
    """Return a directory with all other runs of two and of three processes."""
    root = tmp_path_factory.mktemp("others")
    for size, names in SLOW.items():
        carry_out(root, size, names)
    return root


class OwnStatistics(nn.Module):
    """A network that normalises each part of a mini-batch by itself, and keeps the statistics of the first part."""

    def __init__(self, model: nn.Module, num_parts: int) -> None:
        super().__init__()
        self.model = model
        self.num_parts = num_parts

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the logits of all parts."""
        first, *others = inputs.tensor_split(self.num_parts)
        outputs = [self.model(first)]
        kept = {module: dict(module._buffers) for module in self.model.modules()}
        for part in others:
            for module in kept:  # new tensors, as the backward pass needs those of the other parts
                module._buffers.update({name: buffer.clone() for name, buffer in kept[module].items()})
            outputs.append(self.model(part))
        for module, buffers in kept.items():
            module._buffers.update(buffers)
        return torch.cat(outputs)


def state_of(config, num_processes: int = 1) -> dict:
    """Return what the run's checkpoint holds, but for what tells runs apart and measured seconds."""
    directory = directory_of(config, num_processes)
    checkpoint = load_checkpoint(
        directory.checkpoint, fingerprint=directory.fingerprint, seed=config.seed, device=torch.device("cpu")
    )
    state = copy.copy(vars(checkpoint))
    for name in ("fingerprint", "records_digest", "times"):
        del state[name]
    return without_signs(state)


def without_signs(state):
    """Return nested state with matrices for eigenvectors and eigenvalues: a vector's sign is the library's choice."""
    if not isinstance(state, dict):
        return state
    if state.keys() == {"vectors", "values"}:
        return state["vectors"] @ state["values"].diag_embed() @ state["vectors"].mT
    return {key: without_signs(value) for key, value in state.items()}


def leaves(state, where: str = "") -> Iterator[tuple[str, object]]:
    """Yield the path and value of everything in nested dictionaries and lists."""
    if isinstance(state, dict | list | tuple):
        for key, value in state.items() if isinstance(state, dict) else enumerate(state):
            yield from leaves(value, f"{where}/{key}")
    else:
        yield where, state


def assert_equal_to_rounding(actual, expected) -> None:
    """Compare everything in two states: same keys, types and shapes, floating-point numbers to 1e-8."""
    actual, expected = dict(leaves(actual)), dict(leaves(expected))
    assert actual.keys() == expected.keys()
    for where, value in expected.items():
        got = actual[where]
        if isinstance(value, Tensor) and value.is_floating_point():
            torch.testing.assert_close(
                got, value, rtol=1e-8, atol=1e-9, msg=lambda text, where=where: f"{where}: {text}"
            )
        elif isinstance(value, float):
            is_none = math.isnan(got) and math.isnan(value)
            assert is_none or math.isclose(got, value, rel_tol=1e-8, abs_tol=1e-9), where
        else:
            assert torch.equal(got, value) if isinstance(value, Tensor) else got == value, where


@pytest.mark.parametrize(("size", "name"), [(size, name) for size, names in QUICK.items() for name in names])
def test_processes_train_as_one(root, tmp_path, monkeypatch, name, size):
    """After 22 steps of uneven parts, parameters, momentum, factors, inverses and rows are those of one process.

    In float64, to rounding, for every setting. With ``sync_batch_norm=false`` the one process normalises part by part.
    """
    shared, alone = (shared_config(path / name, all_settings()[name]) for path in (root / str(size), tmp_path))
    if name.endswith("-own-statistics"):
        monkeypatch.setattr(ProcessGroup, "data_parallel", lambda self, model, **options: OwnStatistics(model, size))
    in_float64(alone)
    assert read_run_info(directory_of(shared, size).info).process_counts == [size]
    assert_equal_to_rounding(metrics_without_times(shared, size), metrics_without_times(alone))
    assert_equal_to_rounding(state_of(shared, size), state_of(alone))


@pytest.mark.slow
@pytest.mark.parametrize(("size", "name"), [(size, name) for size, names in SLOW.items() for name in names])
def test_processes_train_as_one_with_every_other_setting(other_root, tmp_path, monkeypatch, name, size):
    """What holds for some settings in every run of the tests holds for all of them."""
    test_processes_train_as_one(other_root, tmp_path, monkeypatch, name, size)


def test_own_statistics_differ_from_shared_ones(root):
    """The two ways of batch normalisation are really two."""
    shared, own = (
        metrics_without_times(shared_config(root / str(size) / name, all_settings()[name]), size)
        for size, name in ((3, "kfac"), (2, "kfac-own-statistics"))
    )
    assert abs(shared[-1]["train_loss"] - own[-1]["train_loss"]) > 1e-4


def test_a_run_goes_on_with_another_number_of_processes(root, tmp_path):
    """Begun by two processes, continued by three and ended by one, a run ends where one process would have taken it.

    Each time one process, not the first, is asked to stop, and all stop after the same step.
    """
    resumed, straight = (shared_config(path / "resumed", stopping_setting()) for path in (root, tmp_path))
    state = state_of(resumed)
    assert (state["step"], read_run_info(directory_of(resumed).info).process_counts) == (4 * 3 + 1, [2, 3])
    for config in (resumed, straight):
        in_float64(config)
    assert read_run_info(directory_of(resumed).info).status == "finished"
    assert_equal_to_rounding(metrics_without_times(resumed), metrics_without_times(straight))
    assert_equal_to_rounding(state_of(resumed), state_of(straight))


def test_every_preconditioner_is_among_the_settings():
    """The settings name every structure, Fisher, damping rule and way of batch normalisation."""
    said = " ".join(" ".join(one) for one in SETTINGS.values())
    for choice in ("kfac", "sua", "grouped", "sua_grouped"):
        assert f"preconditioner={choice}" in said
