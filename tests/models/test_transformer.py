"""The transformer: size, patches, equations and start values, and training with every structure."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from identical import assert_identical
from tiny_runs import metrics_without_times, tiny_config
from torch import Tensor, nn

from kfac_sua.models import VisionTransformer
from kfac_sua.models.transformer import NUM_HEADS, TransformerBlock, cut_patches
from kfac_sua.preconditioner import KroneckerPreconditioner
from kfac_sua.training.loop import run

STRUCTURES = {
    "kfac": {"structure": "kfac"},
    "sua": {"structure": "sua"},
    "grouped": {"structure": "kfac", "group_size": 8},
    "sua_grouped": {"structure": "sua", "group_size": 8},
}


def thin_model() -> VisionTransformer:
    """Return the network with 32 channels in float64, and with normalisation that differs from channel to channel."""
    torch.manual_seed(0)
    model = VisionTransformer(10, width=0.125).double()
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
    return model


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Return all linear layers by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def data(size: int = 4) -> tuple[Tensor, Tensor]:
    """Return images and labels, always the same."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(size, 3, 32, 32, generator=generator), torch.arange(size) % 10


def test_parameter_count() -> None:
    """Exactly 3,201,290 for 10 classes.

    Embedding: 24·256 + 256 = 6,400. Positions: 128·256 = 32,768. Block: 256·768 + 768 + 256·256 + 256 = 263,168 of
    attention, 256·1024 + 1024 + 1024·256 + 256 = 525,568 of the MLP, 2·2·256 = 1,024 of normalisation. Final
    normalisation: 512. Head: 256·10 + 10 = 2,570.
    """
    block = 263_168 + 525_568 + 1_024
    count = sum(parameter.numel() for parameter in VisionTransformer(10).parameters())
    assert count == 6_400 + 32_768 + 4 * block + 512 + 2_570 == 3_201_290


def test_kinds_of_layers() -> None:
    """Four linear layers a block, embedding and head; else layer normalisation and one parameter, the positions."""
    model = VisionTransformer(10)
    shapes = [tuple(layer.weight.shape) for layer in linear_layers(model).values()]
    assert shapes == [(256, 24), *4 * [(768, 256), (256, 256), (1024, 256), (256, 1024)], (10, 256)]
    leaves = [module for module in model.modules() if not list(module.children())]
    assert {type(leaf) for leaf in leaves} == {nn.Linear, nn.LayerNorm}
    in_leaves = {id(parameter) for leaf in leaves for parameter in leaf.parameters()}
    others = {name: tuple(p.shape) for name, p in model.named_parameters() if id(p) not in in_leaves}
    assert others == {"positions": (128, 256)}


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_patches_are_those_of_a_loop(memory_format: torch.memory_format) -> None:
    """Two rows and four columns each, row by row of the image, in the order of colours, rows and columns."""
    images = torch.arange(2 * 3 * 32 * 32).reshape(2, 3, 32, 32).float().contiguous(memory_format=memory_format)
    patches = cut_patches(images)
    assert patches.shape == (2, 128, 24)
    for row in range(16):
        for column in range(8):
            block = images[:, :, 2 * row : 2 * row + 2, 4 * column : 4 * column + 4]
            assert torch.equal(patches[:, 8 * row + column], block.reshape(2, 24))


def normalised(inputs: Tensor, norm: nn.LayerNorm) -> Tensor:
    """Return layer normalisation over the last dimension."""
    centred = inputs - inputs.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight + norm.bias


def attention(inputs: Tensor, block: TransformerBlock) -> Tensor:
    """Return self-attention of ``[batch, tokens, channels]``, head by head."""
    layers = block.attention
    queries, keys, values = (inputs @ layers.qkv.weight.T + layers.qkv.bias).chunk(3, dim=-1)
    size = inputs.shape[-1] // NUM_HEADS
    heads = []
    for head in range(NUM_HEADS):
        own = slice(head * size, (head + 1) * size)
        scores = queries[..., own] @ keys[..., own].mT / math.sqrt(size)
        heads.append(scores.softmax(-1) @ values[..., own])
    return torch.cat(heads, -1) @ layers.output.weight.T + layers.output.bias


def test_logits_equal_the_equations() -> None:
    """Embedding plus positions, four blocks x + attention(norm x), x + MLP(norm x), norm, mean, linear head."""
    model = thin_model().eval()
    inputs = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    hidden = cut_patches(inputs) @ model.embedding.weight.T + model.embedding.bias + model.positions
    for block in model.blocks:
        assert isinstance(block, TransformerBlock)
        hidden = hidden + attention(normalised(hidden, block.norm1), block)
        wide = normalised(hidden, block.norm2) @ block.expand.weight.T + block.expand.bias
        gelu = wide * (1 + torch.erf(wide / math.sqrt(2))) / 2
        hidden = hidden + gelu @ block.contract.weight.T + block.contract.bias
    pooled = normalised(hidden, model.final_norm).mean(1)
    expected = pooled @ model.classifier.weight.T + model.classifier.bias
    torch.testing.assert_close(model(inputs), expected, rtol=1e-10, atol=1e-10)


def test_only_positions_tell_the_order_of_patches() -> None:
    """An image upside down, by rows of patches, has other logits; without positions, the same."""
    model = thin_model()
    inputs = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    turned = inputs.unflatten(2, (16, 2)).flip(2).flatten(2, 3)  # [batch, 3, 16, 2, 32] in between
    assert (model(inputs) - model(turned)).abs().max() > 1e-6
    nn.init.zeros_(model.positions)
    torch.testing.assert_close(model(inputs), model(turned), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("width", "channels"), [(1.5, 384), (0.25, 64), (0.3, 76), (0.01, 32)])
def test_width_scales_channels_by_head(width: float, channels: int) -> None:
    """Channels are those of a head, rounded and at least 8, times four, so that the heads divide them."""
    model = VisionTransformer(7, width=width)
    block = model.blocks[0]
    assert isinstance(block, TransformerBlock)
    assert (model.embedding.out_features, model.classifier.in_features) == (channels, channels)
    assert (block.attention.qkv.out_features, block.expand.out_features) == (3 * channels, 4 * channels)
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 7)


def test_impossible_width_names_the_key() -> None:
    """A width that is no positive number is refused in the user's own words."""
    with pytest.raises(ValueError, match=r"^model.width must be > 0 and finite, got -0.5\.$"):
        VisionTransformer(10, width=-0.5)


def test_gradient_reaches_every_parameter() -> None:
    """No parameter is left out of the graph; of the bias of keys, which softmax cancels, there is rounding alone."""
    model = thin_model()
    images, labels = data()
    F.cross_entropy(model(images.double()), labels).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        if name.endswith("qkv.bias"):
            queries, keys, values = (part.abs().max() for part in parameter.grad.chunk(3))
            assert keys < 1e-12 < min(queries, values)
        assert parameter.grad.abs().max() > 0, name


def test_start_values() -> None:
    """Variance 1 / in_features, 0.01 for the head, 0.02 for positions; activations keep their scale."""
    torch.manual_seed(0)
    model = VisionTransformer(10)
    for name, layer in linear_layers(model).items():
        expected = 0.01 if name == "classifier" else 1 / math.sqrt(layer.in_features)
        assert layer.weight.std().item() == pytest.approx(expected, rel=0.05), name
        assert not layer.bias.any(), name
    assert model.positions.std().item() == pytest.approx(0.02, rel=0.05)
    images, labels = data(20)
    tokens = model.embedding(cut_patches(images)) + model.positions
    assert tokens.std().item() == pytest.approx(1, rel=0.1)
    assert model.blocks(tokens).std().item() < 2.5  # eight branches add to it
    assert F.cross_entropy(model(images), labels).item() == pytest.approx(math.log(10), abs=0.2)


def trained(settings: dict[str, object], num_steps: int = 6) -> tuple[VisionTransformer, list[float]]:
    """Train on one mini-batch; return the network, its last gradients in place, and the losses."""
    torch.manual_seed(0)
    model = VisionTransformer(10, width=0.125)
    preconditioner = KroneckerPreconditioner(model, inverse_period=3, damping=0.1, **settings)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    images, labels = data()
    losses = []
    for _ in range(num_steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        preconditioner.step()
        optimizer.step()
        losses.append(loss.item())
    assert not preconditioner.events
    return model, losses


@pytest.mark.parametrize("structure", STRUCTURES)
def test_every_linear_layer_is_preconditioned(structure: str) -> None:
    """The first step changes the gradients of all linear layers and of nothing else."""
    torch.manual_seed(0)
    model = VisionTransformer(10, width=0.125)
    preconditioner = KroneckerPreconditioner(model, damping=0.1, **STRUCTURES[structure])
    rows = preconditioner.describe().rows
    assert [row.name for row in rows if not row.reason] == list(linear_layers(model))
    reasons = {row.reason for row in rows if row.reason}
    assert reasons == {"normalisation layer", "positions of VisionTransformer itself"}
    images, labels = data()
    F.cross_entropy(model(images), labels).backward()
    before = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    preconditioner.step()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p.grad, before[name])}
    expected = {f"{name}.{kind}" for name in linear_layers(model) for kind in ("weight", "bias")}
    assert changed == expected


@pytest.mark.parametrize("structure", STRUCTURES)
def test_it_trains_with_every_structure(structure: str) -> None:
    """Two refreshes and the steps between lower the loss on four images, without a fault."""
    _, losses = trained(STRUCTURES[structure])
    assert all(map(math.isfinite, losses))
    assert losses[-1] < losses[0] - 0.3


def test_sua_is_kfac() -> None:
    """Linear layers have one tap, so that there is nothing to be uncorrelated with; the bits are the same."""
    (first, losses), (second, same) = (trained(STRUCTURES[name], 3) for name in ("kfac", "sua"))
    assert losses == same
    assert_identical(dict(first.state_dict()), dict(second.state_dict()))


def test_a_run_of_the_command(tmp_path: Path) -> None:
    """The training command takes it: an epoch of two steps, rows before and after."""
    small = ("model=transformer", "model.width=0.125", "dataset.train_size=20", "dataset.train_eval_size=20")
    few = ("dataset.validation_size=20", "batch_size=10", "epochs=1", "preconditioner=grouped")
    config = tiny_config(tmp_path, *small, *few, "preconditioner.group_size=64")  # 8 at this width
    run(config)
    rows = metrics_without_times(config)
    assert [row["step"] for row in rows] == [0, 2]
    assert rows[1]["train_eval_loss"] < rows[0]["train_eval_loss"]
