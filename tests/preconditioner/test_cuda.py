"""The preconditioner on a CUDA device gives what it gives on the CPU."""

import copy

import pytest
import torch
from torch import nn

from kfac_sua.models import TinyConvNet
from kfac_sua.preconditioner import KroneckerPreconditioner, KroneckerSettings

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SETTINGS = [
    {"structure": "kfac"},
    {"structure": "sua", "application": "auto"},
    {"structure": "kfac", "group_size": 8, "damping_rule": "factored_pi"},
    {"structure": "sua", "group_size": 8, "damping_rule": "exact"},
    {"structure": "kfac", "weight_sharing": "reduce", "inverse_method": "low_rank"},
    {"structure": "sua", "fisher_type": "exact", "ema_decay": 0.5},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_cpu_and_cuda_train_alike(settings):
    """Five float64 steps over two refreshes agree to 1e-6 relative."""
    torch.manual_seed(0)
    net = TinyConvNet(10).double()
    inputs, labels = torch.randn(16, 3, 32, 32, dtype=torch.float64), torch.randint(0, 10, (16,))
    results = []
    for device in ("cpu", "cuda"):
        model = copy.deepcopy(net).to(device, memory_format=torch.channels_last)
        preconditioner = KroneckerPreconditioner(
            model, settings=KroneckerSettings(inverse_period=3, damping=0.1, **settings)
        )
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
        for _ in range(5):
            optimizer.zero_grad()
            outputs = model(inputs.to(device))
            preconditioner.fisher_backward(outputs)
            nn.functional.cross_entropy(outputs, labels.to(device)).backward()
            preconditioner.step()
            optimizer.step()
        results.append([parameter.detach().cpu() for parameter in model.parameters()])
    for cuda, cpu in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(cuda, cpu, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("after", [1, 2, 3])
def test_inverses_and_averages_follow_the_model_to_the_device(settings, after):
    """A model moved before or after a refresh trains on as one that was on the device all along."""
    results = []
    for moved_at in (0, after):
        torch.manual_seed(0)
        net = TinyConvNet(10).double().to("cpu" if moved_at else "cuda")
        preconditioner = KroneckerPreconditioner(net, settings=KroneckerSettings(inverse_period=3, **settings))
        generator = torch.Generator().manual_seed(1)
        for step in range(5):
            if step == moved_at:
                net.to("cuda")
            inputs = torch.randn(8, 3, 32, 32, dtype=torch.float64, generator=generator)
            outputs = net(inputs.to(next(net.parameters()).device))
            net.zero_grad()
            preconditioner.fisher_backward(outputs)
            nn.functional.cross_entropy(outputs, torch.arange(8).to(outputs.device)).backward()
            preconditioner.step()
            with torch.no_grad():
                for parameter in net.parameters():
                    parameter -= 0.02 * parameter.grad
        results.append([parameter.detach().cpu() for parameter in net.parameters()])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-8)


def test_a_model_on_several_devices_is_refreshed_device_by_device():
    """A layer on the CPU under one on the device: each has its inverse where it is."""
    net = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3).cuda())
    preconditioner = KroneckerPreconditioner(net)
    net[1](net[0](torch.randn(6, 4)).cuda()).square().sum(1).mean().backward()
    preconditioner.step()
    devices = [layer.inverse.bias_scale.device.type for layer in preconditioner._layers.values()]
    assert devices == ["cpu", "cuda"]
