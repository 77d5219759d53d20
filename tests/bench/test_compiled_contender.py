"""Compiled SGD is a row beside the others, or a sentence about why it is none."""

import shutil

import pytest
import torch
from bench_runs import TINY, shrink_rates, tiny_contenders

from kfac_sua.bench.__main__ import main
from kfac_sua.bench.arithmetic import Arithmetic
from kfac_sua.bench.compiled import COMPILED, CompiledContender
from kfac_sua.bench.contender import Batch
from kfac_sua.bench.record import read_record
from kfac_sua.bench.settings import compose_settings

FLOAT32 = Arithmetic("float32", torch.device("cpu"))
COMMAND = [*TINY, "--compiled", "--settings", "sua"]


class Uncompilable(torch.nn.Module):
    """What a machine without a compiler makes of a network."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()

    def forward(self, inputs: torch.Tensor) -> None:
        """Raise what PyTorch would."""
        raise RuntimeError("InvalidCxxCompiler: No working C++ compiler\nfound in g++\n\nSet TORCHDYNAMO_VERBOSE=1")


@pytest.fixture
def compilations(monkeypatch):
    """Compile nothing, and note what was to be compiled how."""
    shrink_rates(monkeypatch)
    noted = []
    monkeypatch.setattr(torch, "compile", lambda model, mode: noted.append(mode) or model)
    return noted


def test_compiled_sgd_is_a_row_after_the_others(compilations, tmp_path, capsys):
    """With a ratio to plain SGD, which stays the reference; the work of its steps is not counted."""
    path = tmp_path / "new.json"
    assert main([*COMMAND, "--json", str(path), "--layers"]) == 0
    record = read_record(path)
    assert [cost.setting for cost in record.costs] == ["baseline", "sua", COMPILED]
    assert record.why_not_compiled == ""
    assert {work.setting for work in record.steps} == {"baseline", "sua"}
    assert compilations == [None, None]  # for the time and for the memory; no mode on a CPU
    baseline, _, compiled = record.costs
    assert baseline.time.amortised_ratio.median == 1
    unit = baseline.time.plain.seconds.median
    assert compiled.time.amortised_ratio.median == pytest.approx(compiled.time.plain.seconds.median / unit)
    assert compiled.memory.peak_bytes > 0
    for block in capsys.readouterr().out.split("\n\n")[:3]:
        assert block.splitlines()[-1].split()[0] == COMPILED


def test_compiled_sgd_is_nothing_that_gets_slower(compilations, tmp_path, capsys):
    """It is compared with by the eye alone: its time is PyTorch's."""
    path = tmp_path / "new.json"
    assert main([*COMMAND, "--json", str(path)]) == 0
    capsys.readouterr()
    assert main([*COMMAND, "--against", str(path), "--tolerance", "1000"]) == 0
    assert COMPILED not in capsys.readouterr().out.split("\n\n")[-1]


def test_a_machine_without_a_compiler_leaves_a_sentence(monkeypatch, tmp_path, capsys):
    """In the row's place, without PyTorch's advice; all other rows are there."""
    shrink_rates(monkeypatch)
    monkeypatch.setattr(torch, "compile", lambda model, mode: Uncompilable(model))
    path = tmp_path / "new.json"
    assert main([*COMMAND, "--json", str(path)]) == 0
    reason = "InvalidCxxCompiler: No working C++ compiler found in g++"
    record = read_record(path)
    assert [cost.setting for cost in record.costs] == ["baseline", "sua"]
    assert record.why_not_compiled == reason
    rows = capsys.readouterr().out.split("\n\n")[0].splitlines()
    assert rows[-1] == f"compiled  cannot be measured: {reason}."


def test_without_the_option_nothing_is_compiled(compilations, tmp_path):
    """Compiling takes longer than measuring."""
    assert main([*TINY, "--settings", "sua", "--json", str(tmp_path / "new.json")]) == 0
    assert compilations == []


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_compiled_sgd_trains_as_plain_sgd_does():
    """Through what torch.compile really makes of the network."""
    (setting,) = compose_settings([], [], {"model": "tiny", "device": "cpu"})
    compiled = CompiledContender(setting.config, FLOAT32, Batch.random(8, FLOAT32))
    assert compiled.try_warm_up() == ""
    eager = tiny_contenders()["baseline"]
    for _ in range(5):
        eager.timed_step()
    for own, other in zip(compiled.model.parameters(), eager.model.parameters(), strict=True):
        assert torch.allclose(own, other, rtol=1e-3, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_rows_of_a_gpu(tmp_path, monkeypatch):
    """Plain steps are replays there, beside compiled SGD."""
    shrink_rates(monkeypatch)
    path = tmp_path / "new.json"
    assert main([*COMMAND, "--device", "cuda", "--json", str(path)]) == 0
    record = read_record(path)
    assert record.arguments.steps_together == 10
    assert {cost.setting: cost.is_captured for cost in record.costs} == {
        "baseline": True,
        "sua": True,
        COMPILED: False,
    }
    assert all(cost.memory.peak_bytes > 0 for cost in record.costs)
