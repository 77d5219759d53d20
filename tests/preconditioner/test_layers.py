"""Discovery: every layer is preconditioned or named with a reason; nothing is skipped in silence."""

import pytest
import torch
from torch import nn

from kfac_sua.models import VGG11
from kfac_sua.preconditioner import KroneckerPreconditioner
from kfac_sua.preconditioner.layers import discover_layers


def reasons(model, **options):
    """Return layer name to reason (empty for preconditioned layers)."""
    return {layer.name: layer.reason for layer in discover_layers(model, **options)}


class OwnForward(nn.Conv2d):
    """A convolution that does something else than nn.Conv2d."""

    def forward(self, input):
        """Standardise the weight first."""
        return self._conv_forward(input, self.weight - self.weight.mean(), self.bias)


def test_every_kind_of_layer_has_a_verdict():
    """Supported, normalisation, unsupported, frozen, skipped, parametrised, shared and lazy layers are told apart."""
    model = nn.ModuleDict(
        {
            "linear": nn.Linear(3, 3),
            "conv": nn.Conv2d(3, 3, 3),
            "norm": nn.BatchNorm2d(3),
            "group_norm": nn.GroupNorm(1, 3),
            "transposed": nn.ConvTranspose2d(3, 3, 3),
            "conv1d": nn.Conv1d(3, 3, 3),
            "embedding": nn.Embedding(3, 3),
            "frozen": nn.Linear(3, 3),
            "skipped": nn.Linear(3, 3),
            "parametrised": nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)),
            "lazy": nn.LazyLinear(3),
            "attention": nn.MultiheadAttention(4, 2),
            "own_forward": OwnForward(3, 3, 3),
            "bias_a": nn.Linear(3, 3),
            "bias_b": nn.Linear(3, 3),
            "first": nn.Linear(3, 3),
            "second": nn.Linear(3, 3),
        }
    )
    model["frozen"].weight.requires_grad_(False)
    model["second"].weight = model["first"].weight
    model["bias_b"].bias = model["bias_a"].bias
    found = reasons(model, skip=["skip*"])
    assert found["linear"] == found["conv"] == ""
    assert found["norm"] == found["group_norm"] == "normalisation layer"
    assert found["transposed"] == "ConvTranspose2d is not supported (nn.Linear and nn.Conv2d are)"
    assert found["conv1d"].startswith("Conv1d is not supported")
    assert found["embedding"].startswith("Embedding is not supported")
    assert found["frozen"] == "frozen"
    assert found["skipped"] == "listed in skip"
    assert "parametrised" in found["parametrised"]
    assert "lazy" in found["lazy"]
    assert found["attention.out_proj"] == "nn.MultiheadAttention uses its weight without calling it"
    assert found["own_forward"] == "OwnForward overrides forward"
    assert found["bias_a"] == found["bias_b"] == "it shares a parameter with another module"
    assert found["first"] == found["second"] == "it shares a parameter with another module"


def test_surprising_layers_are_warned_about_once_at_construction(caplog):
    """An unsupported layer is a warning, a normalisation layer only information; both are named."""
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Bilinear(2, 2, 2), nn.PReLU())
    with caplog.at_level("INFO", logger="kfac_sua"):
        KroneckerPreconditioner(net)
    messages = {(record.levelname, record.getMessage()) for record in caplog.records}
    assert messages == {
        ("INFO", "Left to the plain gradient (normalisation layer): 1."),
        ("WARNING", "Left to the plain gradient (Bilinear is not supported (nn.Linear and nn.Conv2d are)): 2."),
        ("WARNING", "Left to the plain gradient (PReLU is not supported (nn.Linear and nn.Conv2d are)): 3."),
    }


def test_modules_without_parameters_are_not_listed():
    """Activations, pooling and containers do not appear."""
    assert reasons(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Sequential(nn.Flatten()))) == {"0": ""}


def test_a_skip_entry_that_matches_nothing_is_an_error():
    """A misspelt layer name lists the names there are."""
    with pytest.raises(ValueError, match=r"skip entry 'hed' matches no layer of the model; its layers are head, norm"):
        KroneckerPreconditioner(nn.ModuleDict({"head": nn.Linear(2, 2), "norm": nn.LayerNorm(2)}), skip=["hed"])


def test_a_model_without_supported_layers_is_an_error():
    """There is nothing to precondition: the reasons are given."""
    with pytest.raises(ValueError, match=r"No layer .* \(0: Embedding is not supported"):
        KroneckerPreconditioner(nn.Sequential(nn.Embedding(3, 3)))


def test_a_frozen_bias_counts_as_none():
    """Only the weight is preconditioned, with the factor of a layer without bias."""
    layer = nn.Linear(3, 2)
    layer.bias.requires_grad_(False)
    preconditioner = KroneckerPreconditioner(layer)
    layer(torch.randn(4, 3)).square().mean().backward()
    preconditioner.step()
    assert preconditioner.describe().rows[0].activation_blocks == (1, 3)
    assert layer.bias.grad is None


def test_the_largest_factors_of_vgg11_are_the_papers():
    """Of the convolutions K-FAC inverts 4608×4608, SUA 512×512 (Sec. 3.1), groups of 32 288×288 and 32×32.

    The head adds a homogeneous coordinate for its bias: 513.
    """
    net = VGG11(10)

    def widest(**options):
        preconditioner = KroneckerPreconditioner(net, **options)
        rows = preconditioner.describe().rows
        preconditioner.remove_hooks()
        convolutions = [row for row in rows if row.kind == "Conv2d"]
        return max(max(row.activation_blocks[1], row.gradient_blocks[1]) for row in convolutions)

    assert widest(structure="kfac") == 4608
    assert widest(structure="sua") == 512
    assert widest(structure="kfac", group_size=32) == 288
    assert widest(structure="sua", group_size=32) == 32


def test_describe_counts_blocks_memory_and_flops():
    """The table's numbers are those of the blocks it lists, and the plain-gradient layers are named with reasons."""
    net = nn.Sequential(nn.Conv2d(40, 70, 3, bias=False), nn.BatchNorm2d(70), nn.Flatten(), nn.Linear(70, 10))
    preconditioner = KroneckerPreconditioner(net, structure="sua", group_size=32, skip=["3"])
    table = preconditioner.describe()
    conv = table.rows[0]
    assert (conv.activation_blocks, conv.gradient_blocks) == ((2, 32), (3, 32))
    assert conv.memory_bytes == 4 * (2 * 32**2 + 3 * 32**2)
    assert conv.inverse_flops == 5 * 32**3
    assert conv.apply_flops == 2 * (2 * 70 * 9 * 32**2 + 3 * 40 * 9 * 32**2)
    text = str(table)
    assert "2×32²" in text
    assert "plain gradient (normalisation layer): 1" in text
    assert "plain gradient (listed in skip): 3" in text
