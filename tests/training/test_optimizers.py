"""The comparators: Muon on convolutions against Muon on matrices, AdamW beside it, and both through the whole loop."""

import pytest
import torch
from identical import assert_identical
from tiny_runs import directory_of, metrics_without_times, tiny_config
from torch import nn

from kfac_sua.build import build_optimizer
from kfac_sua.compose import compose_config
from kfac_sua.config import MuonConfig, to_plain
from kfac_sua.models import VGG11, PreActResNet50, TinyConvNet
from kfac_sua.optimizers import MuonWithAdamW
from kfac_sua.optimizers.muon import as_matrix, split_parameters
from kfac_sua.training import loop
from kfac_sua.training.build import build_training
from kfac_sua.training.checkpoint import Checkpoint, load_checkpoint
from kfac_sua.training.loop import run
from kfac_sua.training.progress import Progress
from kfac_sua.training.signals import Interrupted

CPU = torch.device("cpu")
LAYOUTS = pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
ADAMW = ("preconditioner=baseline", "optimizer=adamw", "optimizer.lr=0.01")
MUON = ("preconditioner=baseline", "optimizer=muon", "optimizer.lr=0.1")
NO_BN = ("preconditioner=baseline", "model.batch_norm=false", "optimizer.lr=0.1")
COMPARATORS = pytest.mark.parametrize("overrides", [ADAMW, MUON, NO_BN], ids=["adamw", "muon", "no-bn"])


def muon_config(*overrides: str) -> MuonConfig:
    """Return the settings of ``configs/optimizer/muon.yaml``, with changes."""
    optimizer = compose_config(["preconditioner=baseline", "optimizer=muon", *overrides]).optimizer
    assert isinstance(optimizer, MuonConfig)
    return optimizer


def tiny_model(layout: torch.memory_format = torch.contiguous_format) -> TinyConvNet:
    """Return a network whose second convolution is the only hidden layer."""
    torch.manual_seed(0)
    return TinyConvNet(10).to(memory_format=layout)


def hidden_weight(model: TinyConvNet) -> nn.Parameter:
    """Return the weight that Muon trains, ``[32, 16, 3, 3]``."""
    return model.get_parameter("features.4.weight")


def draw_gradients(model: nn.Module) -> None:
    """Set every gradient to normal numbers, in the memory layout of its parameter, as autograd does."""
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)


def as_rows(weight: torch.Tensor, layout: torch.memory_format) -> torch.Tensor:
    """Return a copy as a matrix, its columns in the order of the layout."""
    if layout is torch.channels_last:
        weight = weight.permute(0, 2, 3, 1)
    return weight.reshape(len(weight), -1).detach().clone()


@LAYOUTS
@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_equals_pytorchs_on_the_matrix(layout, nesterov):
    """After five steps a convolution's weight equals, bit for bit, a matrix that torch.optim.Muon trained."""
    model = tiny_model(layout)
    optimizer = MuonWithAdamW(model, muon_config(f"optimizer.nesterov={nesterov}", "optimizer.weight_decay=0.1"))
    matrix = nn.Parameter(as_rows(hidden_weight(model), layout))
    reference = torch.optim.Muon([matrix], lr=0.02, weight_decay=0.1, momentum=0.95, nesterov=nesterov, ns_steps=5)
    start = matrix.detach().clone()
    for _ in range(5):
        draw_gradients(model)
        matrix.grad = as_rows(hidden_weight(model).grad, layout)
        optimizer.step()
        reference.step()
    assert torch.equal(as_rows(hidden_weight(model), layout), matrix)
    assert not torch.allclose(matrix, start, atol=0.01)


def test_memory_layout_does_not_matter():
    """Either layout takes the same step, to the rounding of Muon's bfloat16 arithmetic."""
    weights = []
    for layout in (torch.contiguous_format, torch.channels_last):
        model = tiny_model(layout)
        optimizer = MuonWithAdamW(model, muon_config("optimizer.lr=1"))
        torch.manual_seed(1)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape)
        before = hidden_weight(model).detach().clone()
        optimizer.step()
        weights.append(before - hidden_weight(model).detach())
    assert weights[0].norm() > 4  # of 32 singular values near 1
    torch.testing.assert_close(*weights, rtol=0.05, atol=0.005)


@LAYOUTS
def test_adamw_trains_the_rest(layout):
    """All other parameters equal, bit for bit, those that AdamW trains alone at the learning rate of its ratio."""
    model, copy = tiny_model(layout), tiny_model(layout)
    config = muon_config("optimizer.adamw_lr_ratio=0.5", "optimizer.weight_decay=0.1")
    optimizer = MuonWithAdamW(model, config)
    _, others = split_parameters(copy)
    reference = torch.optim.AdamW(others, lr=0.01, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.1)
    for _ in range(3):
        draw_gradients(model)
        for parameter, source in zip(copy.parameters(), model.parameters(), strict=True):
            parameter.grad = source.grad
        optimizer.step()
        reference.step()
    for actual, expected in zip(split_parameters(model)[1], others, strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("model", [TinyConvNet(10), VGG11(10, 0.125), VGG11(10, 0.125, batch_norm=False)])
def test_first_and_last_layer_are_adamws(model):
    """Muon has every convolution weight but the first; AdamW that one, the classifier, biases and normalisation."""
    hidden, others = split_parameters(model)
    convolutions = [module.weight for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert list(map(id, hidden)) == list(map(id, convolutions[1:]))
    assert {id(p) for p in others} == {id(p) for p in model.parameters()} - {id(p) for p in hidden}


def test_hidden_weights_of_the_residual_network():
    """All of its 53 convolutions but the stem are Muon's: 16·3 and 4 projections."""
    model = PreActResNet50(10, width=0.125).to(memory_format=torch.channels_last)
    hidden, _ = split_parameters(model)
    assert len(hidden) == 52
    for weight in hidden:  # 1×1 kernels included
        matrix = as_matrix(weight.detach(), like=weight)
        assert matrix.shape == (len(weight), weight[0].numel())
        assert matrix.data_ptr() == weight.data_ptr()


def test_network_without_hidden_layers_is_refused():
    """Two layers are the first and the last."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 2))
    with pytest.raises(ValueError, match="weights of hidden layers, but the network has 2 layers in all"):
        MuonWithAdamW(model, muon_config())


def test_gradients_end_with_zero_grad():
    """The optimizer holds no gradient of its own, so that zero_grad frees the memory."""
    model = tiny_model()
    optimizer = MuonWithAdamW(model, muon_config())
    draw_gradients(model)
    optimizer.step()
    optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in model.parameters())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer.step()  # nothing to do
    assert_identical(dict(model.state_dict()), before)


def test_training_sets_both_learning_rates(tmp_path):
    """The schedule applies to both groups, and AdamW's learning rate stays its ratio of Muon's."""
    config = tiny_config(tmp_path, *MUON, "epochs=2", "schedule=step", "schedule.milestones=[0.5]")
    training = build_training(config, CPU)
    initial = [group["lr"] for group in training.optimizer.param_groups]
    assert initial == pytest.approx([0.1, 0.0015])
    training.epoch = 1
    loop.train_epoch(training, Progress(config.progress, "", total_steps=4, done_steps=0, epochs=1))
    assert [group["lr"] for group in training.optimizer.param_groups] == pytest.approx([0.01, 0.00015])
    saved = training.optimizer.state_dict()
    assert [saved[name]["param_groups"][0]["lr"] for name in ("muon", "adamw")] == pytest.approx([0.01, 0.00015])


def final_state(config, device: torch.device = CPU) -> Checkpoint:
    """Return the checkpoint that a run left."""
    directory = directory_of(config)
    return load_checkpoint(directory.checkpoint, fingerprint=directory.fingerprint, seed=config.seed, device=device)


def interrupt(*_):
    """Press Ctrl-C."""
    raise KeyboardInterrupt


@COMPARATORS
def test_resumed_run_equals_an_uninterrupted_one(tmp_path, monkeypatch, overrides):
    """Interrupted after one of three epochs and started again, a run ends bit for bit where it would have."""
    overrides = (*overrides, "epochs=3", "schedule=cosine")
    straight, resumed = (tiny_config(tmp_path / name, *overrides) for name in ("straight", "resumed"))
    run(straight)
    with monkeypatch.context() as context:
        context.setattr(Progress, "epoch", interrupt)
        with pytest.raises(Interrupted, match=r"resumes from epoch 2\."):
            run(resumed)
    assert run(resumed).status == "finished"
    assert metrics_without_times(resumed) == metrics_without_times(straight)
    for name in ("model", "optimizer"):
        assert_identical(getattr(final_state(resumed), name), getattr(final_state(straight), name), name)


@COMPARATORS
def test_comparator_learns_the_digits(tmp_path, overrides):
    """Eight epochs of all digits bring the validation error from 90 % to below 20 % (measured: 2 %, 4.5 %, 9 %)."""
    run(config := tiny_config(tmp_path, *overrides, "epochs=8", "dataset.train_size=null"))
    assert metrics_without_times(config)[-1]["val_error"] < 0.2


def test_adamw_has_the_settings_of_its_file():
    """Every key of the YAML file reaches PyTorch's AdamW, which trains every parameter."""
    overrides = ["preconditioner=baseline", "optimizer=adamw", "optimizer.weight_decay=0.1"]
    model = tiny_model()
    optimizer = build_optimizer(compose_config(overrides).optimizer, model)
    assert isinstance(optimizer, torch.optim.AdamW)
    (group,) = optimizer.param_groups
    assert len(group["params"]) == len(list(model.parameters()))
    assert [group[key] for key in ("lr", "weight_decay", "betas", "eps")] == [0.001, 0.1, (0.9, 0.999), 1e-8]


def test_sgd_has_the_keys_it_always_had():
    """Other optimizers' keys stay out of SGD's configuration, and so out of the fingerprint of its runs."""
    assert set(to_plain(compose_config().optimizer)) == {"name", "lr", "momentum", "weight_decay", "nesterov"}


def resumed_adamw(config, device, monkeypatch) -> torch.optim.AdamW:
    """Interrupt a run after one epoch, and return the AdamW of a training that goes on from its checkpoint."""
    with monkeypatch.context() as context:
        context.setattr(Progress, "epoch", interrupt)
        with pytest.raises(Interrupted):
            run(config)
    training = build_training(config, device)
    training.optimizer.load_state_dict(final_state(config, device).optimizer)
    return getattr(training.optimizer, "_adamw", training.optimizer)


@pytest.mark.parametrize("overrides", [ADAMW, MUON], ids=["adamw", "muon"])
def test_resume_takes_the_step_count_from_the_checkpoint(tmp_path, monkeypatch, overrides):
    """The counts of steps on which AdamW's bias correction depends go on, and the run ends as it would have."""
    config = tiny_config(tmp_path, *overrides, "epochs=3")
    adamw = resumed_adamw(config, CPU, monkeypatch)
    num_steps = final_state(config).step
    assert num_steps > 0
    assert all(state["step"] == num_steps for state in adamw.state.values())
    assert run(config).status == "finished"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("overrides", [ADAMW, MUON], ids=["adamw", "muon"])
def test_cuda_resume_leaves_the_step_count_on_the_device(tmp_path, monkeypatch, overrides):
    """After a resume no step waits for the GPU to read a count of steps back, and the run ends as it would have."""
    config = tiny_config(tmp_path, *overrides, "device=cuda", "epochs=3")
    adamw = resumed_adamw(config, torch.device("cuda"), monkeypatch)
    assert all(state["step"].is_cuda for state in adamw.state.values())
    assert adamw.param_groups[0]["fused"]
    assert run(config).status == "finished"
