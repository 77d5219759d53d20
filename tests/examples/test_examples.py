"""Every file in examples/ runs, and the loops of other libraries train as a plain loop does."""

import runpy
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from graph_emulator import EmulatedGraph
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import kfac_sua
from kfac_sua import CapturedStep, KroneckerPreconditioner

FOLDER = Path(__file__).resolve().parents[2] / "examples"
NEEDS = {"accelerate_loop": "accelerate", "lightning_loop": "lightning"}
# What each prints at least once, as evidence of what it shows.
SAYS = {
    "accelerate_loop": "loss of the last micro-batch 0.0",
    "captured": "epoch 3: mean loss 0.",
    "amp": "epoch 3: loss of the last mini-batch 0.0",
    "ddp": "epoch 3: loss 0.1",
    "lightning_loop": "loss of the last mini-batch 0.0",
    "newton_muon": "epoch 5: loss of the last mini-batch 0.0",
    "three_lines": "epoch 5: loss of the last mini-batch 0.0",
    "your_own_model": "bit for bit the same: True",
}
SETTINGS: dict[str, Any] = {"structure": "sua", "damping": 0.1, "inverse_period": 10}


def names() -> list[str]:
    """Return the examples' names."""
    return sorted(path.stem for path in FOLDER.glob("*.py"))


def need(name: str) -> None:
    """Skip where the library that an example is about is not installed."""
    if name in NEEDS:
        pytest.importorskip(NEEDS[name], reason=f"needs {NEEDS[name]} (extra examples)")


def load(name: str) -> dict[str, Any]:
    """Return what an example defines, without running it."""
    need(name)
    return runpy.run_path(str(FOLDER / f"{name}.py"), run_name=name)


def torchrun(num_processes: int) -> str:
    """Return what the distributed example prints."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_processes}"]
    result = subprocess.run(
        [*command, str(FOLDER / "ddp.py")], capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_no_example_is_left_out():
    """Whoever adds a file says here what it must print."""
    assert names() == sorted(SAYS)


@pytest.mark.parametrize("name", [name for name in sorted(SAYS) if name != "ddp"])
def test_example_runs(name, capsys):
    """As a script, in this process, which saves the seconds that importing torch takes."""
    need(name)
    runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    assert SAYS[name] in capsys.readouterr().out


def test_captured_example_trains_the_same_with_a_graph(monkeypatch, capsys):
    """With an emulated graph most of its steps are replays, and the losses are those of the CPU."""
    path = str(FOLDER / "captured.py")
    runpy.run_path(path, run_name="__main__")
    eager = capsys.readouterr().out.splitlines()
    monkeypatch.setattr(kfac_sua, "CapturedStep", partial(CapturedStep, graph=EmulatedGraph()), raising=False)
    runpy.run_path(path, run_name="__main__")
    captured = capsys.readouterr().out.splitlines()
    assert captured[:3] == eager[:3]
    assert captured[3] == "42 of 54 steps were replays"


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in sorted(SAYS) if name != "ddp"])
def test_example_runs_in_a_process_of_its_own(name, tmp_path):
    """As its first lines say, from any working directory, where it leaves nothing behind."""
    need(name)
    command = [sys.executable, str(FOLDER / f"{name}.py")]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    assert SAYS[name] in result.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_example_of_two_processes_trains_as_one(monkeypatch, capsys):
    """Under torchrun, with uneven parts, it prints the losses of a single process, once."""
    together = torchrun(2).splitlines()
    for key, value in {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0}.items():
        monkeypatch.setenv(key, str(value))
    runpy.run_path(str(FOLDER / "ddp.py"), run_name="__main__")
    alone = capsys.readouterr().out.splitlines()
    assert len(together) == len(alone) == 3
    assert together[-1].startswith(SAYS["ddp"])
    for one, other in zip(together, alone, strict=True):
        assert loss_in(one) == pytest.approx(loss_in(other), rel=1e-3)


def loss_in(line: str) -> float:
    """Return the loss in a line that the distributed example prints."""
    return float(line.split(" loss ")[1].split(",")[0])


def test_distributed_example_says_how_to_start_it(monkeypatch):
    """Without torchrun it ends with a sentence."""
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit, match=r"Start this with torchrun .* examples/ddp\.py\."):
        runpy.run_path(str(FOLDER / "ddp.py"), run_name="__main__")


# --- the same parameters as a plain loop ------------------------------------------------------------------------------


def make_loader() -> DataLoader[tuple[torch.Tensor, ...]]:
    """Return 12 mini-batches of 20 random images: more steps than lie between two refreshes."""
    generator = torch.Generator().manual_seed(3)
    images = torch.rand(240, 1, 8, 8, generator=generator)
    return DataLoader(TensorDataset(images, torch.randint(10, (240,), generator=generator)), batch_size=20)


def train_plainly(net: nn.Module, micro_batches: int, after: Callable[[], None] = lambda: None) -> None:
    """Train two epochs by hand, accumulating the mean gradient of so many micro-batches per step."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.03, momentum=0.9)
    preconditioner = KroneckerPreconditioner(net, **SETTINGS)
    for _ in range(2):
        for index, (images, labels) in enumerate(make_loader(), start=1):
            (nn.functional.cross_entropy(net(images), labels) / micro_batches).backward()
            if index % micro_batches == 0:
                preconditioner.step()
                after()
                optimizer.step()
                optimizer.zero_grad()


def assert_same(net: nn.Module, other: nn.Module) -> None:
    """Check that two networks have the same parameters and batch-norm statistics."""
    for (name, value), want in zip(net.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(value, want, rtol=1e-5, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}")


def nets(make: Callable[[], nn.Module]) -> tuple[nn.Module, nn.Module]:
    """Return two networks with the same weights."""
    torch.manual_seed(5)
    net, other = make(), make()
    other.load_state_dict(net.state_dict())
    return net, other


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_lightning_trains_as_a_plain_loop(micro_batches):
    """The hook sees the gradient of the whole step, and the statistics are those of its mini-batch."""
    example = load("lightning_loop")
    module, other = nets(example["Classifier"])
    options = {"max_epochs": 2, "accumulate_grad_batches": micro_batches, "accelerator": "cpu"}
    example["train"](module, make_loader(), **options)
    train_plainly(other.net, micro_batches)
    assert_same(module.net, other.net)


def test_lightning_clips_the_preconditioned_gradient():
    """Its own clipping comes after the callback, as a line after step() does."""
    example = load("lightning_loop")
    module, other = nets(example["Classifier"])
    example["train"](module, make_loader(), max_epochs=2, gradient_clip_val=0.5, accelerator="cpu")
    train_plainly(other.net, 1, lambda: nn.utils.clip_grad_norm_(other.net.parameters(), 0.5))
    assert_same(module.net, other.net)


def test_lightning_resumes_bit_for_bit(tmp_path):
    """A checkpoint of Lightning's holds the preconditioner, in the middle of a refresh period."""
    example = load("lightning_loop")
    module, resumed = nets(example["Classifier"])
    example["train"](module, make_loader(), max_epochs=1, accelerator="cpu").save_checkpoint(tmp_path / "one.ckpt")
    example["train"](resumed, make_loader(), max_epochs=2, accelerator="cpu", ckpt_path=tmp_path / "one.ckpt")
    _, whole = nets(example["Classifier"])
    example["train"](whole, make_loader(), max_epochs=2, accelerator="cpu")
    for value, want in zip(resumed.state_dict().values(), whole.state_dict().values(), strict=True):
        assert torch.equal(value, want)


def test_lightning_skips_what_its_scaler_skips():
    """With a GradScaler the statistics do not see the scale, and overflowing mini-batches leave no trace."""
    example = load("lightning_loop")
    from lightning.pytorch.plugins.precision import MixedPrecision

    module, _ = nets(example["Classifier"])
    plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=2.0**30))
    callback = example["Preconditioning"](**SETTINGS)
    example["train"](module, make_loader(), max_epochs=2, plugins=[plugin], accelerator="cpu", callbacks=[callback])
    assert 0 < callback.preconditioner.num_steps < 24
    assert callback.preconditioner.events == {}
    assert all(parameter.isfinite().all() for parameter in module.parameters())


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_accelerate_trains_as_a_plain_loop(micro_batches):
    """Its gradients and statistics are those of the whole step, accumulated or not."""
    example = load("accelerate_loop")
    net, other = nets(example["make_model"])
    accelerator = example["Accelerator"](cpu=True, gradient_accumulation_steps=micro_batches)
    example["train"](net, make_loader(), accelerator, num_epochs=2)
    train_plainly(other, micro_batches)
    assert_same(net, other)


def test_accelerate_skips_what_its_scaler_skips():
    """A mini-batch whose gradient overflows takes no step and leaves no trace in the preconditioner."""
    example = load("accelerate_loop")
    net, other = nets(example["make_model"])
    loader = make_loader()
    images, labels = (tensor.clone() for tensor in loader.dataset.tensors)
    images[:20] = torch.inf  # the first mini-batch, where statistics are due
    accelerator = example["Accelerator"](cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    example["train"](net, DataLoader(TensorDataset(images, labels), batch_size=20), accelerator, num_epochs=1)
    assert accelerator.scaler.get_scale() == 2.0**15
    without = DataLoader(TensorDataset(images[20:], labels[20:]), batch_size=20)
    example["train"](other, without, example["Accelerator"](cpu=True), num_epochs=1)
    for value, want in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(value, want, rtol=1e-4, atol=1e-6)
