"""Models of others, end to end: every parameter named, gradients right or left alone, the loss falling."""

import copy
from collections import Counter
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from oracles import DenseLayer, dense_precondition, locations_of, output_locations_of
from preconditioner.foreign_models import FOREIGN_MODELS, ForeignModel, swin_transformer
from torch import nn

from kfac_sua.preconditioner import KroneckerPreconditioner, KroneckerSettings

# Models at their full width, of which a step takes half a second; the smallest is in the fast tests.
LARGE = ("resnet18", "resnet18, frozen backbone", "densenet121", "lraspp_mobilenet_v3_large")


def by_size(values: Iterable[Any]) -> list[Any]:
    """Return names of models, or tuples that begin with one, as parameters; those of large models are slow."""
    tuples = [value if isinstance(value, tuple) else (value,) for value in values]
    return [pytest.param(*value, marks=pytest.mark.slow if value[0] in LARGE else ()) for value in tuples]


def make(name: str, dtype: torch.dtype = torch.float32) -> tuple[ForeignModel, nn.Module, torch.Tensor]:
    """Return a foreign model, its module and a mini-batch."""
    foreign = FOREIGN_MODELS[name]
    torch.manual_seed(0)
    net = foreign.make().to(dtype)
    inputs = foreign.inputs(torch.Generator().manual_seed(1))
    return foreign, net, inputs.to(dtype) if inputs.is_floating_point() else inputs


def start(net: nn.Module) -> KroneckerPreconditioner:
    """Return the preconditioner that all models get."""
    return KroneckerPreconditioner(net, structure="sua", group_size=32, damping=0.1, inverse_period=3)


@pytest.mark.parametrize("name", FOREIGN_MODELS)
def test_every_parameter_belongs_to_exactly_one_row_of_the_table(name):
    """A row is preconditioned or has its reason; together the rows hold every parameter of the model once."""
    foreign, net, _ = make(name)
    rows = start(net).describe().rows
    assert sum(not row.reason for row in rows) == foreign.preconditioned
    assert Counter(row.reason for row in rows if row.reason) == foreign.left
    held = [id(parameter) for row in rows for parameter in parameters_of(net.get_submodule(row.name))]
    assert sorted(held) == sorted(id(parameter) for parameter in net.parameters())


def parameters_of(module: nn.Module) -> list[nn.Parameter]:
    """Return a module's own parameters, and those that its own are computed from."""
    parametrised = getattr(module, "parametrizations", None)
    inside = [] if parametrised is None else [*parametrised.parameters()]
    return [*module.parameters(recurse=False), *inside]


@pytest.mark.parametrize("name", by_size(FOREIGN_MODELS))
def test_the_loss_falls_and_what_is_left_alone_has_the_plain_gradient(name):
    """Five steps over two refreshes; gradients beside the preconditioned ones are bit for bit plain."""
    foreign, net, inputs = make(name)
    twin = copy.deepcopy(net)
    preconditioner = start(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.03)
    losses = []
    for step in range(5):
        optimizer.zero_grad()
        torch.manual_seed(7)  # of dropout
        loss = foreign.loss(net(inputs))
        loss.backward()
        preconditioner.step()
        if step == 0:
            check_plain_gradients(foreign, net, twin, inputs, preconditioner)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert Counter(key.split(":")[0] for key in preconditioner.events) == foreign.events


def check_plain_gradients(foreign, net, twin, inputs, preconditioner):
    """Compare the gradients with those of a copy that has no preconditioner."""
    torch.manual_seed(7)
    foreign.loss(twin(inputs)).backward()
    reported = {key.split(":")[1] for key in preconditioner.events}
    changed = 0
    for row in preconditioner.describe().rows:
        pairs = zip(
            parameters_of(net.get_submodule(row.name)), parameters_of(twin.get_submodule(row.name)), strict=True
        )
        same = [got.grad is want.grad is None or torch.equal(got.grad, want.grad) for got, want in pairs]
        assert all(same) if row.reason or row.name in reported else not any(same), row.name
        changed += not (row.reason or row.name in reported)
    assert changed == foreign.preconditioned - sum(foreign.events.values())


LAYERS = [
    ("resnet18", "conv1", {}),
    ("resnet18", "layer2.0.downsample.0", {}),
    ("resnet18", "fc", {}),
    ("resnet18, frozen backbone", "fc", {"damping_rule": "factored_pi"}),
    ("mobilenet_v3_small", "features.0.0", {"structure": "sua"}),
    ("mobilenet_v3_small", "features.1.block.0.0", {}),
    ("mobilenet_v3_small", "features.1.block.0.0", {"structure": "sua", "weight_sharing": "reduce"}),
    ("mobilenet_v3_small", "features.1.block.1.fc1", {}),
    ("mobilenet_v3_small", "features.4.block.1.0", {"group_size": 8}),
    ("vit_b_16, reduced", "conv_proj", {"structure": "sua"}),
    ("vit_b_16, reduced", "encoder.layers.encoder_layer_0.mlp.0", {"weight_sharing": "reduce"}),
    ("vit_b_16, reduced", "encoder.layers.encoder_layer_1.mlp.3", {}),
    ("swin_t, reduced", "features.1.0.mlp.0", {}),
    ("convnext_tiny, reduced", "features.1.0.block.0", {"group_size": 4}),
    ("convnext_tiny, reduced", "features.1.0.block.3", {}),
    ("nn.TransformerEncoder", "0.layers.0.linear1", {}),
    ("U-Net", "enter.0", {"structure": "sua", "group_size": 8}),
    ("U-Net", "leave.2", {}),
    ("MLP auto-encoder", "2", {}),
    ("LSTM classifier", "head", {}),
    ("in-place activations", "3", {"structure": "kfac"}),
    ("spectral and weight norm", "6", {"weight_sharing": "reduce"}),
]


@pytest.mark.parametrize(("name", "layer", "options"), by_size(LAYERS), ids=str)
def test_layers_of_foreign_models_have_the_dense_solves_gradient(name, layer, options):
    """In float64, from inputs and output gradients that other hooks see, by dense Kronecker solves."""
    foreign, net, inputs = make(name, torch.float64)
    twin = copy.deepcopy(net)
    calls = record(twin.get_submodule(layer))
    torch.manual_seed(7)
    foreign.loss(twin(inputs)).backward()
    settings = KroneckerSettings(damping=0.1, **options)
    preconditioner = KroneckerPreconditioner(net, settings=settings)
    torch.manual_seed(7)
    foreign.loss(net(inputs)).backward()
    preconditioner.step()
    module, plain = net.get_submodule(layer), twin.get_submodule(layer)
    ((layer_inputs, output_grads),) = zip(calls["inputs"], calls["grads"], strict=True)
    bias_grad = None if plain.bias is None else plain.bias.grad
    arguments = plain, layer_inputs, output_grads * len(inputs), plain.weight.grad, bias_grad, settings
    weight, bias = solve(*arguments)
    assert not torch.allclose(module.weight.grad, plain.weight.grad, rtol=0.01, atol=0)
    pairs = [(module.weight.grad, weight)] + ([] if bias is None else [(module.bias.grad, bias)])
    for got, want in pairs:
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-9 * weight.abs().max().item())


def record(module: nn.Module) -> dict[str, list[torch.Tensor]]:
    """Return what will hold the inputs and output gradients of a module's calls."""
    calls = {"inputs": [], "grads": []}

    def hook(module, args, output):
        calls["inputs"].append(args[0].detach().clone())
        output.register_hook(lambda grad: calls["grads"].append(grad.clone()))

    module.register_forward_hook(hook)
    return calls


def solve(module, inputs, output_grads, weight_grad, bias_grad, settings):
    """Solve with the dense matrix, or factor by factor where the matrix would not fit."""
    if weight_grad.numel() // getattr(module, "groups", 1) <= 1500:
        return dense_precondition(module, inputs, output_grads, weight_grad, bias_grad, settings)
    assert settings.structure == "kfac"
    assert settings.group_size is None
    reads, grads = locations_of(module, inputs), output_locations_of(module, output_grads)
    dense = DenseLayer(reads, grads, bias_grad is not None, settings)
    root = (settings.damping / dense.scale) ** 0.5
    columns = weight_grad if weight_grad.dim() == 2 else weight_grad.permute(0, 2, 3, 1).flatten(1)
    if bias_grad is not None:
        columns = torch.cat([columns, bias_grad[:, None]], dim=1)
    pi = 1.0
    if settings.damping_rule == "factored_pi":
        means = [factor.diagonal().mean() for factor in (dense.activation, dense.gradient)]
        pi = (means[0] / means[1]).sqrt()
    activation, gradient = (
        factor + damping * torch.eye(len(factor), dtype=torch.float64)
        for factor, damping in ((dense.activation, root * pi), (dense.gradient, root / pi))
    )
    solved = torch.linalg.solve(activation, torch.linalg.solve(gradient, columns).mT).mT / dense.scale
    bias = None if bias_grad is None else solved[:, -1]
    solved = solved if bias_grad is None else solved[:, :-1]
    if weight_grad.dim() == 4:
        out, channels, height, width = weight_grad.shape
        solved = solved.view(out, height, width, channels).permute(0, 3, 1, 2)
    return solved, bias


def test_linear_layers_of_swin_whose_weights_are_used_without_a_call_are_named(caplog):
    """Its attention computes with the weights of ``qkv`` and ``proj`` itself: a warning says so, layer by layer."""
    torch.manual_seed(0)
    net = swin_transformer()
    preconditioner = start(net)
    net(torch.randn(4, 3, 16, 16)).square().sum(1).mean().backward()
    preconditioner.step()
    names = [record.getMessage().split(":")[0] for record in caplog.records if "call not seen" in record.getMessage()]
    assert names == [f"features.{stage}.0.attn.{layer}" for stage in (1, 3) for layer in ("qkv", "proj")]
