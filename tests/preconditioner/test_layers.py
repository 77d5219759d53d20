"""Discovery: every layer is preconditioned or named with a reason; nothing is skipped in silence."""

import functools
from dataclasses import replace

import pytest
import torch
from torch import nn

from kfac_sua.models import VGG11
from kfac_sua.preconditioner import KroneckerPreconditioner
from kfac_sua.preconditioner.model import discovery
from kfac_sua.preconditioner.model.discovery import discover_layers


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
    assert "2x32^2" in text
    assert "plain gradient (normalisation layer): 1" in text
    assert "plain gradient (listed in skip): 3" in text


def test_the_table_fits_a_terminal():
    """Of many layers with long names, the widest numbers and much that is left out; nothing is cut off."""
    net = nn.Sequential()
    for index in range(12):
        net.add_module(f"encoder_{index:03}_attention_output_projection", nn.Linear(2100, 2100, device="meta"))
        net.add_module(f"encoder_{index:03}_normalisation", nn.LayerNorm(2100, device="meta"))
    table = KroneckerPreconditioner(net, application="auto").describe()
    lines = str(table).splitlines()
    assert max(map(len, lines)) <= 100
    for row in table.rows:
        told = [line.split() for line in lines if row.name in line]
        assert len(told) == (1 if row.reason else 2), row.name  # sizes, and how its factors are inverted and applied
    sizes, ways = [line.split(maxsplit=1)[1] for line in lines if line.startswith(table.rows[0].name)]
    assert sizes.split()[:3] == ["K-FAC", "1x2101^2", "1x2100^2"]
    assert f"{', '.join(table.rows[0].forms)}  " in ways


@pytest.mark.parametrize(
    ("kind", "sizes"), [(nn.Linear, (0, 5)), (nn.Linear, (5, 0)), (nn.Conv2d, (0, 4, 3)), (nn.Conv2d, (4, 0, 1))]
)
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_a_layer_of_no_width_is_left_alone(kind, sizes):
    """It has no gradient to precondition; the layers beside it train."""
    empty = kind(*sizes)
    net = nn.ModuleDict({"empty": empty, "full": nn.Linear(4, 2)})
    assert reasons(net) == {"empty": f"its weight is empty, {list(empty.weight.shape)}", "full": ""}
    preconditioner = KroneckerPreconditioner(net)
    loss = net["full"](torch.randn(3, 4)).square().mean()
    if isinstance(empty, nn.Linear):
        loss = loss + empty(torch.randn(3, empty.in_features)).sum()
    loss.backward()
    assert preconditioner.step()


def test_channels_are_read_off_the_weight():
    """A layer whose weight was cut, as structured pruning does, computes with what it has."""
    cut = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.Flatten(), nn.Linear(6, 5))
    cut[0].weight, cut[0].bias = nn.Parameter(cut[0].weight[:4].clone()), nn.Parameter(cut[0].bias[:4].clone())
    cut[2].weight = nn.Parameter(cut[2].weight[:, :4].clone())
    whole = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.Flatten(), nn.Linear(4, 5))
    whole.load_state_dict(cut.state_dict())
    inputs = torch.randn(8, 4, 3, 3)
    for net in (cut, whole):
        preconditioner = KroneckerPreconditioner(net)
        net(inputs).square().mean().backward()
        preconditioner.step()
    for one, other in zip(cut.parameters(), whole.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


def test_a_weight_of_another_kind_of_shape_is_named():
    """Its layer is left alone, as one cannot say what it computes."""
    net = nn.Sequential(nn.Linear(3, 4), nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, groups=2), nn.Linear(2, 2))
    net[0].weight = nn.Parameter(torch.zeros(12))
    net[1].weight = nn.Parameter(torch.zeros(4, 3, 5, 5))
    net[2].weight = nn.Parameter(torch.zeros(3, 2, 3, 3))
    assert reasons(net) == {
        "0": "its weight has the shape [12], where Linear needs [out, in]",
        "1": "its weight has the shape [4, 3, 5, 5], where Conv2d needs [1 * out, in, 3, 3]",
        "2": "its weight has the shape [3, 2, 3, 3], where Conv2d needs [2 * out, in, 3, 3]",
        "3": "",
    }


# --- names ------------------------------------------------------------------------------------------------------------


def with_two_names():
    """Return a model that holds a layer under two names, and a block under two more."""
    block = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    head = nn.Linear(3, 3)
    return nn.ModuleDict(
        {"encoder": block, "decoder": nn.ModuleList([nn.Linear(3, 3), block]), "head": head, "output": head}
    )


@pytest.mark.parametrize(
    ("pattern", "skipped"),
    [
        ("output", {"head"}),
        ("head", {"head"}),
        ("decoder.1.*", {"encoder.0", "encoder.1"}),
        ("decoder.*", {"encoder.0", "encoder.1", "decoder.0"}),
        ("decoder.1.0", {"encoder.0"}),
    ],
)
def test_skip_matches_every_name_of_a_layer(pattern, skipped):
    """A module that is registered twice is skipped under either name, and reported under its first."""
    found = reasons(with_two_names(), skip=[pattern])
    assert {name for name, reason in found.items() if reason} == skipped
    assert set(found) == {"encoder.0", "encoder.1", "decoder.0", "head"}


def test_the_error_of_a_misspelt_name_lists_all_names():
    """Also the second ones."""
    expected = r"its layers are encoder\.0 \(also decoder\.1\.0\), .*, decoder\.0, head \(also output\)\.$"
    with pytest.raises(ValueError, match=expected):
        KroneckerPreconditioner(with_two_names(), skip=["tail"])


class Twice(nn.Module):
    """Holds a module under two names."""

    def __init__(self, inside):
        super().__init__()
        self.one = self.other = inside

    def __repr__(self):
        """Say nothing of the module inside, which may have a billion names."""
        return "Twice"


def test_names_of_deeply_shared_modules_are_found_in_time():
    """Thirty levels that hold the next one twice have a billion names; some of them are looked at."""
    module = nn.Linear(2, 2)
    for _ in range(30):
        module = Twice(module)
    net = nn.ModuleDict({"deep": module, "flat": nn.Linear(2, 2)})
    first = ".".join(["deep", *["one"] * 30])
    assert reasons(net, skip=["deep.*.other"]) == {first: "listed in skip", "flat": ""}


def test_a_module_that_holds_itself_has_the_names_below():
    """Such a circle does not keep discovery going round."""
    net = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)))
    net[1].add_module("parent", net)
    assert reasons(net, skip=["1.0"]) == {"0": "", "1.0": "listed in skip"}


# --- forwards of others -----------------------------------------------------------------------------------------------


class AlignDevicesHook:
    """Stands in for accelerate's hook of this name: here all is on one device already."""

    no_grad = False


class LayerwiseCastingHook(AlignDevicesHook):
    """Stands in for a hook that changes numbers."""


def hooked(module, hook=AlignDevicesHook):
    """Put a hook around a module's forward, as ``accelerate.hooks.add_hook_to_module`` does."""
    old_forward = module.forward

    def new_forward(module, *args, **kwargs):
        return module._old_forward(*args, **kwargs)

    module._old_forward, module._hf_hook = old_forward, hook()
    module.forward = functools.update_wrapper(functools.partial(new_forward, module), old_forward)
    return module


def hooked_by_accelerate(module):
    """Put the real hook on."""
    hooks = pytest.importorskip("accelerate.hooks")
    return hooks.add_hook_to_module(module, hooks.AlignDevicesHook(execution_device="cpu", io_same_device=True))


@pytest.mark.parametrize("application", ["weight", "auto"])
@pytest.mark.parametrize("add_hook", [hooked, hooked_by_accelerate])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_layer_in_a_hook_that_moves_tensors_is_preconditioned(add_hook, application, when):
    """Its gradients are those of the bare layer, whether the hook came before the preconditioner or after it."""

    def gradients(is_hooked):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 20, 3, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(20, 4)).double()
        if is_hooked and when == "before":
            for layer in (net[0], net[3]):
                add_hook(layer)
        preconditioner = KroneckerPreconditioner(net, application=application, inverse_period=2)
        if is_hooked and when == "after":
            for layer in (net[0], net[3]):
                add_hook(layer)
        assert [layer.name for layer in preconditioner.layers] == ["0", "3"]
        for _ in range(4):
            net.zero_grad()
            net(torch.randn(2, 3, 3, 3).double()).square().mean().backward()
            assert preconditioner.step()
        assert not preconditioner.events
        return [parameter.grad for parameter in net.parameters()]

    for one, other in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_the_hook_goes_on_working_in_the_backward_application():
    """No forward of ours takes the place of accelerate's, before or after."""
    layer = hooked(nn.Conv2d(3, 20, 3, bias=False))
    forward = layer.forward
    preconditioner = KroneckerPreconditioner(layer, application="auto")
    assert layer.forward is forward
    preconditioner.remove_hooks()
    assert layer.forward is forward


def test_hooks_and_forwards_that_do_something_else_are_named():
    """By the hook's class, or by where the code of what was put in the forward's place is from."""
    net = nn.ModuleDict({name: nn.Linear(2, 2) for name in ("cast", "patched", "wrapped", "called", "bound", "plain")})
    hooked(net["cast"], LayerwiseCastingHook)
    net["patched"].forward = lambda inputs: inputs
    net["wrapped"].forward = functools.wraps(net["wrapped"].forward)(double)
    net["called"].forward = Doubler()
    net["bound"].forward = Doubler().call
    here = __name__
    test = "test_hooks_and_forwards_that_do_something_else_are_named"
    assert reasons(net) == {
        "cast": "accelerate's LayerwiseCastingHook changes what goes through it",
        "patched": f"its forward has been replaced, by {here}.{test}.<locals>.<lambda>",
        "wrapped": f"its forward has been replaced, by {here}.double",
        "called": f"its forward has been replaced, by {here}.Doubler",
        "bound": f"its forward has been replaced, by {here}.Doubler.call",
        "plain": "",
    }


def double(inputs):
    """Return twice the inputs."""
    return 2 * inputs


class Doubler:
    """Doubles its inputs."""

    def __call__(self, inputs):
        """Return twice the inputs."""
        return 2 * inputs

    def call(self, inputs):
        """Return twice the inputs."""
        return 2 * inputs


def test_a_hook_between_devices_is_named(monkeypatch):
    """Where weights lie on several devices, a hook brings the inputs that are recorded from another one."""
    surroundings = discovery._surroundings
    on_several_devices = lambda *args: replace(surroundings(*args), is_on_several_devices=True)  # noqa: E731
    monkeypatch.setattr(discovery, "_surroundings", on_several_devices)
    net = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    hooked(net[0])
    assert reasons(net) == {"0": "accelerate's AlignDevicesHook brings its inputs from another device", "1": ""}


def test_an_offloaded_layer_is_left_alone():
    """Its weight is nowhere between two calls; one whose weight stays is preconditioned."""
    net = nn.Sequential(nn.Linear(4, 3, device="meta"), nn.Linear(3, 2))
    hooked(net[0]), hooked(net[1])
    assert reasons(net) == {
        "0": "its weight is offloaded (on device meta between two calls), and so is its gradient",
        "1": "",
    }


def test_a_model_that_accelerate_offloads_is_refused():
    """There is nothing to precondition, and the error says why."""
    accelerate = pytest.importorskip("accelerate")
    net = accelerate.cpu_offload(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"No layer .* \(0: its weight is offloaded \(on device meta"):
        KroneckerPreconditioner(net)


def test_a_model_that_accelerate_dispatches_trains_as_the_bare_one():
    """Every module has a hook, the model itself included."""
    accelerate = pytest.importorskip("accelerate")
    torch.manual_seed(0)
    bare = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    net.load_state_dict(bare.state_dict())
    net = accelerate.dispatch_model(
        net, device_map={"0": "cpu", "1": "cpu", "2": "cpu"}, main_device="cpu", force_hooks=True
    )
    assert hasattr(net[0], "_hf_hook")
    inputs = torch.randn(6, 4)
    for model in (bare, net):
        preconditioner = KroneckerPreconditioner(model)
        model(inputs).square().mean().backward()
        preconditioner.step()
    for one, other in zip(net.parameters(), bare.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


# --- device meta ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("application", ["weight", "auto"])
def test_a_model_on_device_meta_is_described_but_not_trained(application):
    """Its table is that of the model with numbers; a step says what to do, after which training goes on."""
    with torch.device("meta"):
        net = nn.Sequential(nn.Conv2d(3, 20, 3, bias=False), nn.Flatten(), nn.Linear(20, 4))
    preconditioner = KroneckerPreconditioner(net, application=application)
    table = str(preconditioner.describe())
    net(torch.randn(2, 3, 3, 3, device="meta")).square().mean().backward()
    with pytest.raises(RuntimeError, match=r"^Layer '0' is on device meta and has no numbers to train: .*to_empty"):
        preconditioner.step()
    preconditioner.discard()
    net.to_empty(device="cpu")
    for parameter in net.parameters():
        nn.init.normal_(parameter)
        parameter.grad = None
    for _ in range(2):
        net.zero_grad()
        net(torch.randn(2, 3, 3, 3)).square().mean().backward()
        assert preconditioner.step()
    preconditioner.remove_hooks()
    assert table == str(KroneckerPreconditioner(net, application=application).describe())


def test_a_layer_left_on_device_meta_is_named():
    """As one that loading a checkpoint has left out."""
    net = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2, device="meta"))
    preconditioner = KroneckerPreconditioner(net)
    net[0](torch.randn(2, 4)).square().mean().backward()
    with pytest.raises(RuntimeError, match=r"^Layer '1' is on device meta"):
        preconditioner.step()
