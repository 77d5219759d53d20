"""The preconditioner on a CUDA device gives what it gives on the CPU."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from kfac_sua.models import TinyConvNet
from kfac_sua.preconditioner import KroneckerPreconditioner, KroneckerSettings
from kfac_sua.preconditioner.forms import DenseInverse, LowRankInverse
from kfac_sua.preconditioner.forms.dense import gram, inverses_of_triangles
from kfac_sua.preconditioner.precision import application_precision, factor_precision

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
    {"structure": "activation_only", "ema_decay": 0.5},
    {"structure": "eigenvalue_corrected", "fisher_type": "exact"},
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


@pytest.mark.parametrize("form", ["dense", "rows"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_parts_on_tensor_cores_are_the_cpus(form, side):
    """The same parts, to the bit, and products that differ by the order of float32 sums."""
    torch.manual_seed(0)
    inverse = LowRankInverse(torch.randn(2, 40, 200) / 20, torch.tensor([0.5, 2.0])[:, None, None])
    if form == "dense":
        inverse = DenseInverse(inverse.dense())
    values = torch.randn(2, 200, 72) if side == "left" else torch.randn(2, 72, 200)
    on_cpu = inverse.split()
    tensors = {name: tensor.cuda() for name, tensor in inverse.tensors().items()}
    on_cuda = type(inverse)(**tensors).split()
    for one, other in zip(on_cpu.tensors().values(), on_cuda.tensors().values(), strict=True):
        assert torch.equal(one, other.cpu())
    with application_precision():
        got, want = getattr(on_cuda, side)(values.cuda()).cpu(), getattr(on_cpu, side)(values)
    assert (got - want).norm() < 1e-5 * want.norm()


@pytest.mark.parametrize("shape", [(2, 102_400, 32), (4, 25_600, 32), (32, 6_400, 64), (1, 5_000, 96)], ids=str)
def test_gram_matrices_in_chunks_are_more_exact_than_whole_ones(shape):
    """Against float64, in IEEE float32."""
    blocks, rows, width = shape
    values = torch.randn(rows, blocks, width, device="cuda").transpose(0, 1)  # [blocks, rows, width], as of channels
    want = values.double().mT @ values.double()
    with factor_precision():
        chunked, whole = gram(values), torch.bmm(values.mT, values)
    errors = [float((one.double() - want).norm() / want.norm()) for one in (chunked, whole)]
    assert errors[0] < 1e-6
    assert errors[0] <= 2 * errors[1]


@pytest.mark.parametrize(("blocks", "width"), [(9, 512), (300, 32), (70, 288), (1, 2304), (1, 513)])
def test_inverses_of_triangles_on_cuda(blocks, width):
    """By products of blocks, against float64."""
    torch.manual_seed(0)
    rows = torch.randn(blocks, 2 * width, width, device="cuda")
    matrices = rows.mT @ rows / width
    with factor_precision():
        got = inverses_of_triangles(torch.linalg.cholesky_ex(matrices)[0])
    want = torch.linalg.inv(matrices.double())
    assert (got.double() - want).norm() < 1e-3 * want.norm()


@pytest.mark.parametrize("settings", [{"structure": "kfac"}, {"structure": "sua", "group_size": 8}], ids=str)
def test_a_refresh_waits_for_the_device_once(settings):
    """PyTorch itself warns of each wait."""
    torch.manual_seed(0)
    net = TinyConvNet(10).cuda()
    preconditioner = KroneckerPreconditioner(net, settings=KroneckerSettings(inverse_period=1, **settings))
    inputs, labels = torch.randn(16, 3, 32, 32, device="cuda"), torch.randint(0, 10, (16,), device="cuda")
    for is_first in (True, False):
        net.zero_grad()
        nn.functional.cross_entropy(net(inputs), labels).backward()
        torch.cuda.set_sync_debug_mode("default" if is_first else "warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                preconditioner.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert len([one for one in caught if "synchroniz" in str(one.message)]) == 1


def test_products_are_split_where_tf32_is_allowed_and_parts_are_faster():
    """By the switch at the time of the refresh; gradients agree with those of IEEE products."""
    grads = {}
    for allowed in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Flatten(), nn.Linear(2048, 2048, bias=False), nn.Tanh(), nn.Linear(2048, 10)).cuda()
        preconditioner = KroneckerPreconditioner(net, structure="sua", damping=0.1)
        inputs, labels = torch.randn(3000, 2048, device="cuda"), torch.randint(0, 10, (3000,), device="cuda")
        nn.functional.cross_entropy(net(inputs), labels).backward()
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = allowed
        try:
            preconditioner.step()
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before
        forms = preconditioner.describe().rows[0].forms
        assert forms == (("dense bf16x3",) * 2 if allowed else ("dense",) * 2)
        grads[allowed] = net[1].weight.grad
    assert (grads[True] - grads[False]).norm() < 1e-3 * grads[False].norm()


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_passes_that_do_not_land_leave_no_trace_on_cuda(settings):
    """Autograd's own threads run the backward pass there: adversarial, checkpointed, dropped passes, and a penalty."""
    results = []
    for is_disturbed in (False, True):
        torch.manual_seed(0)
        net = TinyConvNet(10).double().cuda()
        preconditioner = KroneckerPreconditioner(net, inverse_period=2, **settings)
        for index in range(3):
            generator = torch.Generator().manual_seed(index)
            images = torch.randn(16, 3, 32, 32, dtype=torch.float64, generator=generator).cuda()
            labels = torch.randint(0, 10, (16,), generator=generator).cuda()
            net.zero_grad()
            if is_disturbed:
                moved = images.clone().requires_grad_()
                torch.autograd.grad(nn.functional.cross_entropy(net(moved), labels), moved)
                nn.functional.cross_entropy(net(-images), labels).backward()
                net.zero_grad()
            outputs = checkpoint(net, images, use_reentrant=False) if is_disturbed else net(images)
            preconditioner.fisher_backward(outputs)
            nn.functional.cross_entropy(outputs, labels).backward()
            preconditioner.step()
        results.append([parameter.grad for parameter in net.parameters()])
        assert not preconditioner.events
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
    net.zero_grad()
    net(images).square().mean().backward()
    preconditioner.step()  # a plain step
    net.zero_grad()
    outputs = net(images)
    preconditioner.fisher_backward(outputs)
    weight = preconditioner.layers[0].weight
    (nn.functional.cross_entropy(outputs, labels) + weight.abs().sum()).backward()
    preconditioner.step()
    assert preconditioner.events == {f"gradient_not_explained:{preconditioner.layers[0].name}": 1}
